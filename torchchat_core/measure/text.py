"""The text that models are measured on, and the windows in which they see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchchat_core.errors import TorchchatError
from torchchat_core.small_files import read_text
from torchchat_core.specs import Tokenizer

OWN_TEXT = Path(__file__).resolve().parent.parent / "data" / "texts" / "lighthouse.txt"
DOCUMENT_END = "<|endoftext|>"  # how collections such as TinyStories separate their documents; no part of the text
CHARACTERS = 8000
WINDOW = 256  # tokens


@dataclass(frozen=True, kw_only=True)
class MeasuredText:
    """A text, or its beginning."""

    name: str
    content: str  # without separators of documents
    read: int  # characters, with them
    whole: int  # characters of the text that it is the beginning of

    @property
    def description(self) -> str:
        """Its name and how much of it is read: "story.txt, the first 8000 of 2097152 characters"."""
        some = f"the first {self.read} of " if self.read < self.whole else ""
        return f"{self.name}, {some}{self.whole} characters"


def measured_text(path: Path | None = None, characters: int = CHARACTERS) -> MeasuredText:
    """The first `characters` of a UTF-8 file, or of the text that comes with torchchat; separators of documents go.

    Raises `TorchchatError` for a file that cannot be read, is no UTF-8, or too short to say anything.
    """
    try:
        content = read_text(path or OWN_TEXT)
    except TorchchatError as error:
        raise TorchchatError(error.message, "choose another file, of UTF-8 text") from None
    kept = content[:characters].replace(DOCUMENT_END, "")
    if not kept.strip():
        raise TorchchatError(f"{path} holds no text in its first {characters} characters", "choose another file")
    return MeasuredText(name=path.name if path else "torchchat's own text", content=kept,
                        read=min(characters, len(content)), whole=len(content))


@dataclass(frozen=True)
class Window:
    """A stretch of a text as a model sees it."""

    fed: tuple[int, ...]
    expected: tuple[int, ...]  # after each of the tokens in `fed`, the one that follows


def encoded(text: MeasuredText, tokenizer: Tokenizer) -> list[int]:
    """The text's tokens, without BOS. Raises `TorchchatError` where there are too few to measure anything."""
    ids = tokenizer.encode(text.content)
    if len(ids) < 2:
        raise TorchchatError(f"{text.name} has {len(ids)} tokens; at least 2 are needed", "choose a longer text")
    return ids


def text_windows(ids: Sequence[int], bos_id: int | None, size: int = WINDOW) -> list[Window]:
    """Windows of `size` tokens without overlap, in which every token of `ids` is predicted once.

    With BOS, it stands before each window's own `size` - 1 tokens. Without, a window begins with the last token of
    the one before, and the first token of all is not predicted. Raises `TorchchatError` for windows of fewer than 2.
    """
    if size < 2:
        raise TorchchatError(f"a window of {size} tokens predicts nothing", "2 is the least")
    row = [ids[index : index + size - 1] for index in range(0, len(ids), size - 1)]
    if bos_id is not None:
        return [Window((bos_id, *chunk[:-1]), tuple(chunk)) for chunk in row]
    overlapping = [ids[index : index + size] for index in range(0, len(ids) - 1, size - 1)]
    return [Window(tuple(chunk[:-1]), tuple(chunk[1:])) for chunk in overlapping]
