"""Text that others wrote, as Markdown that Streamlit shows without surprises.

Streamlit escapes HTML by itself, but does not read it as text. It has additions to Markdown: $ begins a formula,
`:red[...]`, `:material/...:` and `:smile:` are directives, and `->` becomes an arrow. Prices and colons are more
frequent in answers than those. Some of them are looked for after escapes were taken away; only a character between,
which has no width, keeps them from being found.
"""

from __future__ import annotations

import re

FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})", re.MULTILINE)
CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
FORMULA = re.compile(r"(?<!\\)\$(?=[^\s\d$])[^$\n]*?(?<=[^\s\\])\$(?!\d)")
BRACKETED = re.compile(r"\\\((.+?)\\\)", re.DOTALL)  # how many models write formulas
DISPLAYED = re.compile(r"\\\[\s*(\S.*?)\s*\\\]|(?<!\\)\$\$\s*([^\s$].*?)\s*\$\$", re.DOTALL)
CONTAINER = re.compile(r"[ \t]*(?:>[ \t]?)*[ \t]*")  # the start of a line in a quotation or list
LIST_MARKER = re.compile(r"(?:[-*+]|\d{1,9}[.)])[ \t]+")
BADGE = re.compile(r"\[!\[([^\]\n]*)\]\([^()\s]*(?:[ \t]+[^()\n]*)?\)\](?=\()")  # a picture inside a link
PICTURE = re.compile(r"!\[([^\]\n]*)\](?:\((<[^<>\n]*>|[^()\s]*(?:\([^()\s]*\)[^()\s]*)*)[^()\n]*\))?")
JOINER = "\u2060"  # has no width, and no line ends at it
DIRECTIVE = re.compile(r":(?=[a-z][a-z-]*\[)")
SHORTCODE = re.compile(r":(?=(?!\d+:)[\w+-]+(?:/[\w-]+)?:)", re.ASCII)  # the time of day is none
SYMBOL = re.compile(r"(?<!\S)(<->|[<-]-|->|[<>~]=)(?!\S)")
TAG = re.compile(r"(?<!\\)<(?=[A-Za-z/!?])(?!https?://[^\s<>]*>|mailto:[^\s<>]*>)")  # of HTML: text here, not left out
ADDRESS = re.compile(r"https?://[^\s<>)\]]+")
SPECIAL = re.compile(r"([\\`*_{}\[\]()<>#+\-.!|~$:])")


def shown(text: str) -> str:
    """A model's answer as Markdown: code stays as it is, formulas are formulas, everything else is text."""
    parts, position = [], 0
    for start, end in _fences(text):
        parts += [_spans(text[position:start]), text[start:end]]
        position = end
    return "".join([*parts, _spans(text[position:])])


def plain(text: str) -> str:
    """Text in which nothing is Markdown, for labels: line ends stay."""
    text = SYMBOL.sub(lambda found: JOINER.join(found[1]), SHORTCODE.sub(f":{JOINER}", text))
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
    parts, position = [], 0
    for match in DISPLAYED.finditer(text):
        parts += [_inline_formulas(text[position : match.start()]), _display(text, match)]
        position = match.end()
    return "".join([*parts, _inline_formulas(text[position:])])


def _display(text: str, match: re.Match[str]) -> str:
    """Return a display formula as Markdown: on separate lines, inside the list or quotation that contains it."""
    formula = (match[1] or match[2]).strip()
    line = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
    if line.lstrip().startswith("|"):  # a table row has to stay on one line
        return f"${' '.join(formula.split())}$"
    prefix = CONTAINER.match(line)[0]  # type: ignore[index]  # it matches an empty string
    marker = LIST_MARKER.match(line, len(prefix))
    before = prefix + " " * len(marker[0]) if marker else prefix
    lines = ["$$", *(each.strip() for each in formula.splitlines() if each.strip()), "$$"]
    block = "\n".join(before + each for each in lines)
    starts_line = not line[len(before) :].strip()
    rest = _line_rest(text, match.end())
    return ((block[len(line) :] if starts_line else f"\n{before.rstrip()}\n{block}")
            + (f"\n{before.rstrip()}\n{before}" if rest else ""))


def _inline_formulas(text: str) -> str:
    text = BRACKETED.sub(lambda found: f"${found[1].strip()}$", text)
    text = ADDRESS.sub(lambda found: found[0].replace("$", "%24"), text)  # the same address, and no formula
    parts, position = [], 0
    for match in FORMULA.finditer(text):
        parts += [_words(text[position : match.start()]), match[0]]
        position = match.end()
    return "".join([*parts, _words(text[position:])])


def _words(text: str) -> str:
    text = PICTURE.sub(_link, BADGE.sub(r"[\1]", text))
    text = DIRECTIVE.sub(r"\\:", TAG.sub(r"\\<", re.sub(r"(?<!\\)\$", r"\\$", text)))
    return SHORTCODE.sub(f":{JOINER}", text)


def _link(picture: re.Match[str]) -> str:
    """Return a link in place of a picture: loading it from another host would reveal the reader's address."""
    description, address = picture[1], picture[2]
    return f"[{description or address}]({address})" if address else rf"\![{description}]"
