"""A chat template as pieces that are put together without Jinja, for runtimes that have no Python.

What a template makes of plain conversations is found by rendering it with marks in place of the messages, and is then
tried with other conversations. What does not fit the pieces is refused: never approximated.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

from jinja2 import nodes

from torchchat_core.chat_template import ChatTemplate
from torchchat_core.errors import TorchchatError
from torchchat_core.template_sandbox import chat_environment

Piece = str | dict[str, str]
Turn = tuple[str, str | None]
PARTS = ("only", "first", "middle", "last")
LONGEST = 5  # turns that are tried
SPACE = "\t \u2003\t"  # around the marks: shows where a template takes white space off
MARK = re.compile("\ue000(?:([sua])([0-9])|date:([^\ue001]*))\ue001")
ROLES = {"s": "system", "u": "user", "a": "assistant"}
MOST_CONSTANTS = 300
DAY = datetime(2031, 11, 9)


class _Unfit(Exception):
    """The template cannot be written as pieces, for this reason."""


def chat_pieces(template: ChatTemplate) -> dict[str, Any]:
    """The pieces, as JSON.

    `with_system` and `without_system` hold what a conversation of one turn is (`only`), or the `first`, `middle` and
    `last` of several: a list of texts, of {"role", "trim"} for a message's text (`trim`: "none", "left", "right",
    "both"), and of {"date": format of strftime}; or {"refused": why}. A turn is a message of the user and the answer,
    which the last one lacks. `unless` lists, by role, texts (""; white space alone) that a message must not hold,
    because the template treats it in a way that pieces do not.
    """
    found = {"without_system": _parts(template, None), "with_system": _parts(template, "s")}
    for system, parts in ((None, found["without_system"]), ("s", found["with_system"])):
        _refuse_wrong(template, parts, system)
    return {**found, "unless": _unless(template, found)}


def assembled(pieces: dict[str, Any], system: str | None, turns: Sequence[Turn], today: datetime | None = None) -> str:
    """The prompt of a conversation, as runtimes put it together. Raises `TorchchatError` for what is refused."""
    parts = pieces["without_system" if system is None else "with_system"]
    texts = {"system": system or "", "user": "", "assistant": ""}
    prompt = []
    for index, (user, assistant) in enumerate(turns):
        texts |= {"user": user, "assistant": assistant or ""}
        part = parts[_part(index, len(turns))]
        if isinstance(part, dict):
            raise TorchchatError(f"the model's chat template cannot be used so: {part['refused']}")
        prompt += [_written(piece, texts, today or datetime.now()) for piece in part]
    return "".join(prompt)


def _written(piece: Piece, texts: dict[str, str], today: datetime) -> str:
    if isinstance(piece, str):
        return piece
    if "date" in piece:
        return today.strftime(piece["date"])
    text = texts[piece["role"]]
    text = text.lstrip() if piece["trim"] in ("left", "both") else text
    return text.rstrip() if piece["trim"] in ("right", "both") else text


def _part(index: int, count: int) -> str:
    if count == 1:
        return "only"
    return "first" if index == 0 else "last" if index == count - 1 else "middle"


# ---- finding the pieces -------------------------------------------------------------------------------------------


def _parts(template: ChatTemplate, system: str | None) -> dict[str, Any]:
    """Of conversations with or without a system message."""
    parts: dict[str, Any] = {}
    for count, wanted in ((1, ("only",)), (3, ("first", "middle", "last"))):
        try:
            turns = _turns(template, system, count)
            parts.update(zip(wanted, turns, strict=True))
        except _Unfit as error:
            parts.update({name: {"refused": str(error)} for name in wanted})
    return parts


def _turns(template: ChatTemplate, system: str | None, count: int) -> list[list[Piece]]:
    """The pieces of each turn: what stands before the first message after a turn's answer belongs to the next turn."""
    marked = [(_marked(f"u{index}"), _marked(f"a{index}")) for index in range(count - 1)]
    text = _rendered(template, None if system is None else _marked("s0"), [*marked, (_marked(f"u{count - 1}"), None)],
                     lambda form: f"\ue000date:{form}\ue001")
    turns: list[list[Piece]] = [[]]
    at, expected = 0, [f"{role}{index}" for index in range(count) for role in ("ua" if index < count - 1 else "u")]
    for mark in MARK.finditer(text):
        before, piece = text[at:mark.start()], _piece(mark, text)
        at = mark.end()
        if isinstance(piece, dict) and "trim" in piece:
            before = before.removesuffix(SPACE) if piece["trim"] in ("none", "right") else before
            at += len(SPACE) if piece["trim"] in ("none", "left") else 0
        turns[-1] += [before, piece] if before else [piece]
        if mark[1] in ("u", "a"):
            if not expected or mark[1] + mark[2] != expected.pop(0):
                raise _Unfit("it puts messages in another order, or leaves one out")
            if mark[1] == "a":
                turns.append([])
        elif mark[1] == "s" and any("role" in each and each["role"] == "system" for turn in turns for each in turn[:-1]
                                    if isinstance(each, dict)):
            raise _Unfit("it repeats the system message")
    if expected or (system is not None and "\ue000s0\ue001" not in text):
        raise _Unfit("it leaves a message out")
    if text[at:]:
        turns[-1].append(text[at:])
    if any("\ue000" in piece for turn in turns for piece in turn if isinstance(piece, str)):
        raise _Unfit("it cuts messages")
    return turns


def _piece(mark: re.Match[str], text: str) -> Piece:
    if mark[3] is not None:
        return {"date": mark[3]}
    kept_left, kept_right = text[:mark.start()].endswith(SPACE), text.startswith(SPACE, mark.end())
    trim = {(True, True): "none", (False, True): "left", (True, False): "right"}.get((kept_left, kept_right), "both")
    return {"role": ROLES[mark[1]], "trim": trim}


def _marked(name: str) -> str:
    return f"{SPACE}\ue000{name}\ue001{SPACE}"


def _rendered(template: ChatTemplate, system: str | None, turns: Sequence[Turn], date: Callable[[str], str]) -> str:
    """What Jinja makes of it. Raises `_Unfit` where the template refuses."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for user, assistant in turns:
        messages.append({"role": "user", "content": user})
        if assistant is not None:
            messages.append({"role": "assistant", "content": assistant})
    try:
        return template.render(messages, variables={"strftime_now": date})
    except TorchchatError as error:
        raise _Unfit(error.message) from None


# ---- trying them --------------------------------------------------------------------------------------------------


def _fits(template: ChatTemplate, pieces: dict[str, Any], system: str | None, turns: Sequence[Turn]) -> bool:
    """Whether the pieces say what the template does; both may refuse."""
    try:
        wanted: str | None = _rendered(template, system, turns, DAY.strftime)
    except _Unfit:
        wanted = None
    try:
        return assembled(pieces, system, turns, DAY) == wanted
    except TorchchatError:
        return True


def _refuse_wrong(template: ChatTemplate, parts: dict[str, Any], system: str | None) -> None:
    """Takes out what does not hold for conversations of other lengths, or of other texts."""
    pieces = {"with_system": parts, "without_system": parts}
    content = None if system is None else "Be brief.\n\nBe kind."
    for count in range(1, LONGEST + 1):
        names = {_part(index, count) for index in range(count)}
        if any(isinstance(parts[name], dict) for name in names):
            continue
        if not all(_fits(template, pieces, content, turns) for turns in _conversations(count)):
            for name in names:
                parts[name] = {"refused": "it makes something else of other messages"}


def _conversations(count: int) -> Iterator[list[Turn]]:
    texts = itertools.cycle(["Hello!", "  two\nlines \n", "1 + 1 = 2", "{{ x }} <b>", "\u00e9\u4e16\U0001f600"])
    for _ in range(3):
        turns: list[Turn] = [(next(texts), next(texts)) for _ in range(count)]
        yield [*turns[:-1], (turns[-1][0], None)]


def _unless(template: ChatTemplate, pieces: dict[str, Any]) -> dict[str, list[str]]:
    """Texts that the template looks for in messages: its own constants are tried as part of one."""
    found: dict[str, list[str]] = {}
    for role in ROLES.values():
        odd = [text for text in ("", *_constants(template.source))
               if not all(_fits(template, pieces, *conversation) for conversation in _with(role, text))]
        if odd:
            found[role] = odd
    return found


def _with(role: str, text: str) -> Iterator[tuple[str | None, list[Turn]]]:
    """Conversations in which a message of the role is `text`, or holds it at the beginning, middle and end."""
    forms: Iterable[str] = ("", " \n") if not text else (text, f"{text}b", f"a{text}b", f"a{text}", f"{text}a{text}")
    for form, system, count in itertools.product(forms, (None, "Be brief."), (1, 2, 3)):
        turns: list[Turn] = [(f"question {index}", f"answer {index}") for index in range(count - 1)]
        if role == "system":
            yield form, [*turns, ("question", None)]
        elif role == "user":
            yield system, [*turns, (form, None)]
            yield system, [(form, each[1]) for each in turns] + [("question", None)]
        else:
            yield system, [(each[0], form) for each in turns] + [("question", None)]


def _constants(source: str) -> list[str]:
    """The texts that stand in the template's expressions, which are what it could compare messages with."""
    tree = chat_environment().parse(source)
    texts = (node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str))
    return list(dict.fromkeys(text for text in texts if text.strip()))[:MOST_CONSTANTS]
