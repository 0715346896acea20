"""Markdown on a terminal while it is still being written."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown


class MarkdownStream:
    """Shows Markdown as it arrives: finished blocks are printed for good, the one being written is redrawn.

    Redrawing the whole answer would flicker, and would tear once it is taller than the terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._open = ""  # the block that is being written
        self._live: Live | None = None

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
        self._live.update(Markdown(self._tail(block)), refresh=True)

    def _tail(self, block: str) -> str:
        """The end of a block that is taller than the terminal; a fence that was cut off is opened again."""
        room = max(self._console.height - 2, 1)
        lines = block.split("\n")
        if len(lines) <= room:
            return block
        fence = next((line for line in lines[:-room] if line.lstrip().startswith("```")), None)
        return "\n".join([*([fence] if fence and _in_fence("\n".join(lines[:-room])) else []), *lines[-room:]])

    def _settle(self, block: str) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if block.strip():
            self._console.print(Markdown(block))


def split_finished(text: str) -> tuple[str, str]:
    """(blocks that no further text can change, the block that is being written)."""
    at = len(text)
    while (at := text.rfind("\n\n", 0, at)) >= 0:
        if not _in_fence(text[:at]) and not _continues_list(text[:at], text[at + 2 :]):
            return text[: at + 2], text[at + 2 :]
    return "", text


def _in_fence(text: str) -> bool:
    return sum(line.lstrip().startswith("```") for line in text.split("\n")) % 2 == 1


def _continues_list(before: str, after: str) -> bool:
    """Whether the block after a blank line may belong to the list before it."""
    last = before.rstrip("\n").rpartition("\n\n")[2]
    return last.lstrip().startswith(_LIST_STARTS) and (not after.strip() or after.startswith((" ", *_LIST_STARTS)))


_LIST_STARTS = ("- ", "* ", "+ ", *(f"{number}." for number in range(1, 100)))
