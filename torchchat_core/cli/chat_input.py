"""Parse the input of the chat: messages and commands on single lines, and blocks between triple quotes."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator

from torchchat_core.errors import TorchchatError
from torchchat_core.small_files import written_text

QUOTES = '"""'
COMMAND = re.compile(r"(/(?:[a-z]+|\?))(?:\s+(.*))?", re.DOTALL | re.IGNORECASE)
BLOCK = re.compile(r'\s*(?:/system\s+)?"""')


def parse_command(text: str) -> tuple[str, str] | None:
    """Return the name and the argument of a command, or None for a message.

    A command is a slash and letters, alone or before white space: "/etc/hosts is empty" is a message.
    """
    found = COMMAND.fullmatch(text.strip())
    return (found[1].lower(), (found[2] or "").strip()) if found else None


def block_is_open(text: str) -> bool:
    '''Return True if the text opens a block with """ and does not close it.'''
    found = BLOCK.match(text)
    return found is not None and not text[found.end():].rstrip().endswith(QUOTES)


def without_quotes(text: str) -> str:
    """Return a block's text without the triple quotes and the newlines next to them. Other text is unchanged."""
    text = text.strip()
    if len(text) < 2 * len(QUOTES) or not (text.startswith(QUOTES) and text.endswith(QUOTES)):
        return text
    return text[len(QUOTES):-len(QUOTES)].removeprefix("\n").removesuffix("\n")


def is_block(text: str) -> bool:
    """Return True if the text is a triple-quoted message, which is never a command."""
    return text.lstrip().startswith(QUOTES)


def read_messages(lines: Iterable[bytes]) -> Iterator[str]:
    """Yield the messages and commands in the lines of standard input, one for each line or block.

    Empty lines are skipped. Raises `TorchchatError` for a line that is not UTF-8, or a block that does not end.
    """
    block: list[str] = []
    begun = 0  # line where the block begins
    for number, content in enumerate(lines, start=1):
        if number > 1 and content.startswith(codecs.BOM_UTF8):
            content = "\ufeff".encode() + content  # only the first line can have a byte order mark
        line = written_text(content, f"line {number} of standard input").removesuffix("\n")
        if not block and not line.strip():
            continue
        block.append(line)
        begun = begun or number
        if not block_is_open("\n".join(block)):
            yield "\n".join(block).strip()
            block, begun = [], 0
    if block:
        raise TorchchatError(f"the block that begins in line {begun} of standard input has no end",
                             f"end it with {QUOTES}")
