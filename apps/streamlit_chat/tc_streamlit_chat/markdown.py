"""Text that others wrote, as Markdown that Streamlit shows without surprises.

Streamlit escapes HTML by itself, but does not read it as text. It has additions to Markdown: $ begins a formula, and
`:red[...]` and `:material/...:` are directives. Prices and colons are more frequent in answers than those.
"""

from __future__ import annotations

import re

FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})", re.MULTILINE)
CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
FORMULA = re.compile(r"(?<!\\)(\$\$(?=\S|\n).+?\$\$|\$(?=[^\s\d$])[^$\n]*?(?<=[^\s\\])\$(?!\d))", re.DOTALL)
BRACKETED = re.compile(r"\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)  # how many models write formulas
DIRECTIVE = re.compile(r":(?=[a-z][a-z-]*\[|material/|streamlit:|[a-z0-9_+-]+:)")
TAG = re.compile(r"(?<!\\)<(?=[A-Za-z/!?])")  # begins HTML, in which Markdown is none: not shown as what it is
SPECIAL = re.compile(r"([\\`*_{}\[\]()<>#+\-.!|~$:])")


def shown(text: str) -> str:
    """A model's answer as Markdown: code stays as it is, formulas are formulas, everything else is text."""
    parts, position = [], 0
    for start, end in _fences(text):
        parts += [_spans(text[position:start]), text[start:end]]
        position = end
    return "".join([*parts, _spans(text[position:])])


def plain(text: str) -> str:
    """Text in which nothing is Markdown, for labels and for what a person typed: line ends stay."""
    return SPECIAL.sub(r"\\\1", text).replace("\n", "  \n")


def _fences(text: str) -> list[tuple[int, int]]:
    """Where code blocks are, the one that is still being written included."""
    found, begun = list[tuple[int, int]](), None
    for match in FENCE.finditer(text):
        mark = match[1]
        if begun is None:
            begun = match.start(), mark
        elif mark[0] == begun[1][0] and len(mark) >= len(begun[1]) and _line_rest(text, match.end()) == "":
            found.append((begun[0], match.end()))
            begun = None
    return [*found, (begun[0], len(text))] if begun is not None else found


def _line_rest(text: str, position: int) -> str:
    end = text.find("\n", position)
    return text[position : end if end >= 0 else len(text)].strip()


def _spans(text: str) -> str:
    parts, position = [], 0
    for match in CODE_SPAN.finditer(text):
        parts += [_formulas(text[position : match.start()]), match[0]]
        position = match.end()
    return "".join([*parts, _formulas(text[position:])])


def _formulas(text: str) -> str:
    text = BRACKETED.sub(lambda found: f"${found[1].strip()}$" if found[1] else f"$${found[2]}$$", text)
    parts, position = [], 0
    for match in FORMULA.finditer(text):
        parts += [_words(text[position : match.start()]), match[0]]
        position = match.end()
    return "".join([*parts, _words(text[position:])])


def _words(text: str) -> str:
    return DIRECTIVE.sub(r"\\:", TAG.sub(r"\\<", re.sub(r"(?<!\\)\$", r"\\$", text)))
