"""Markdown on a terminal while it is still being written."""

from __future__ import annotations

import re
from types import TracebackType

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment


class MarkdownStream:
    """Shows Markdown as it arrives: finished blocks are printed for good, the one being written is redrawn.

    Redrawing the whole answer would flicker, and would tear once it is taller than the terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._open = ""  # the block that is being written
        self._live: Live | None = None
        self._settled = False  # whether a block was printed for good

    def __enter__(self) -> MarkdownStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._settle(self._open)
        self._open = ""

    def write(self, text: str) -> None:
        """Adds text to what is shown."""
        self._open += text
        finished, self._open = split_finished(self._open)
        if finished:
            self._settle(finished)
        if self._open.strip():
            self._draw(self._open)

    def _draw(self, block: str) -> None:
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True, vertical_overflow="crop")
            self._live.start()
        self._live.update(LastRows(Markdown(self._tail(block)), self._rows), refresh=True)

    def _tail(self, block: str) -> str:
        """Return the last lines of a block taller than the terminal, and reopen a code fence that was cut off."""
        lines = block.split("\n")
        if len(lines) <= self._rows:
            return block
        fence = open_fence("\n".join(lines[:-self._rows]))
        return "\n".join([*([fence] if fence else []), *lines[-self._rows:]])

    @property
    def _rows(self) -> int:
        """The number of terminal rows that the block may take: rows that scroll away cannot be erased."""
        return max(self._console.height - 2, 1)

    def _settle(self, block: str) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if block.strip():
            if self._settled:
                self._console.print()
            self._console.print(Markdown(block))
            self._settled = True


class LastRows:
    """Render only the last `count` terminal rows of `content`."""

    def __init__(self, content: RenderableType, count: int) -> None:
        self._content = content
        self._count = count

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for row in console.render_lines(self._content, options, pad=False)[-self._count:]:
            yield from row
            yield Segment.line()


def split_finished(text: str) -> tuple[str, str]:
    """(blocks that no further text can change, the block that is being written)."""
    at = len(text)
    while (at := text.rfind("\n\n", 0, at)) >= 0:
        if open_fence(text[:at]) is None and not _continues_list(text[:at], text[at + 2 :]):
            return text[: at + 2], text[at + 2 :]
    return "", text


def open_fence(text: str) -> str | None:
    """The line that began a code block which `text` has not ended, or None."""
    opened: str | None = None
    for line in text.split("\n"):
        marks = FENCE.match(line)
        if not marks:
            continue
        if opened is None:
            opened = line
        elif marks[1].startswith(opened.strip()[: _fence_length(opened)]) and not line.strip().strip(marks[1][0]):
            opened = None
    return opened


def _fence_length(line: str) -> int:
    stripped = line.strip()
    return len(stripped) - len(stripped.lstrip(stripped[0]))


def _continues_list(before: str, after: str) -> bool:
    """Whether the block after a blank line may belong to the list before it."""
    last = before.rstrip("\n").rpartition("\n\n")[2]
    return last.lstrip().startswith(_LIST_STARTS) and (not after.strip() or after.startswith((" ", *_LIST_STARTS)))


FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_LIST_STARTS = ("- ", "* ", "+ ", *(f"{number}." for number in range(1, 100)))
