"""The text that models are measured on, and the windows in which they see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchchat_core.errors import TorchchatError
from torchchat_core.small_files import read_file, written_text
from torchchat_core.specs import Tokenizer

OWN_TEXT = Path(__file__).resolve().parent.parent / "data" / "texts" / "lighthouse.txt"
DOCUMENT_END = "<|endoftext|>"  # how collections such as TinyStories separate their documents; no part of the text
CHARACTERS = 8000
OWN_NOTE = "torchchat's own text was written for this purpose, so only differences between models and recipes are " \
           "meaningful; --file TEXT measures on a text of your own"
WINDOW = 256  # tokens


@dataclass(frozen=True, kw_only=True)
class MeasuredText:
    """A text, or its beginning."""

    name: str
    content: str  # without separators of documents
    read: int  # characters, with them
    whole: int  # characters of the text that it is the beginning of
    is_own: bool = False  # True for the text that comes with torchchat

    @property
    def note(self) -> str | None:
        """A note on how to read results on torchchat's own text; None for the user's text."""
        return OWN_NOTE if self.is_own else None

    @property
    def description(self) -> str:
        """Its name and how much of it is read: "story.txt, the first 8000 of 2097152 characters"."""
        some = f"the first {self.read} of " if self.read < self.whole else ""
        return f"{self.name}, {some}{self.whole} characters"


def measured_text(path: Path | None = None, characters: int = CHARACTERS) -> MeasuredText:
    """Return the first `characters` of a UTF-8 file, or of the text that comes with torchchat, without document
    separators. Windows line endings become line feeds.

    Raises `TorchchatError` for a file that cannot be read, is no UTF-8, or too short to say anything.
    """
    try:
        content = written_text(read_file(path or OWN_TEXT), str(path or OWN_TEXT))
    except TorchchatError as error:
        raise TorchchatError(error.message, "choose another file, of UTF-8 text") from None
    kept = content[:characters].replace(DOCUMENT_END, "")
    if not kept.strip():
        raise TorchchatError(f"{path} holds no text in its first {characters} characters", "choose another file")
    return MeasuredText(name=path.name if path else "torchchat's own text", content=kept,
                        read=min(characters, len(content)), whole=len(content), is_own=path is None)


@dataclass(frozen=True)
class Window:
    """A stretch of a text as a model sees it."""

    fed: tuple[int, ...]
    expected: tuple[int, ...]  # the tokens that follow the last of those in `fed`; what stands before is context


def encoded(text: MeasuredText, tokenizer: Tokenizer) -> list[int]:
    """The text's tokens, without BOS. Raises `TorchchatError` where there are too few to measure anything."""
    ids = tokenizer.encode(text.content)
    if len(ids) < 2:
        raise TorchchatError(f"{text.name} has {len(ids)} tokens; at least 2 are needed", "choose a longer text")
    return ids


def window_size(asked: int | None, longest: int) -> int:
    """Tokens of a window of a model that holds `longest` of them; None: `WINDOW`, or what the model holds.

    Raises `TorchchatError` for a window that is impossible.
    """
    if asked is not None and not 2 <= asked <= longest:
        raise TorchchatError(f"--window is {asked} tokens; the model takes 2 to {longest}", f"--window {longest}")
    return asked or min(WINDOW, longest)


def text_windows(ids: Sequence[int], bos_id: int | None, size: int = WINDOW, stride: int | None = None
                 ) -> list[Window]:
    """Windows of `size` tokens, in which every token of `ids` is predicted once.

    A window begins `stride` tokens after the one before it, and predicts what that one did not; None: `size` - 1, so
    that they do not overlap. With BOS, it stands before each window's own `size` - 1 tokens. Without, the first token
    of all is not predicted. Raises `TorchchatError` for windows of fewer than 2, or a stride that leaves tokens out.
    """
    if size < 2:
        raise TorchchatError(f"a window of {size} tokens predicts nothing", "2 is the least")
    stride = size - 1 if stride is None else stride
    if not 1 <= stride < size:
        raise TorchchatError(f"--stride is {stride} tokens; with windows of {size} it goes from 1 to {size - 1}")
    first = () if bos_id is None else (bos_id,)
    room, predicted = size - len(first), 1 - len(first)  # tokens of a window's own; those that need no prediction
    windows = []
    for begin in range(0, len(ids), stride):
        if predicted == len(ids):
            break
        end = min(begin + room, len(ids))
        windows.append(Window((*first, *ids[begin : end - 1]), tuple(ids[predicted:end])))
        predicted = end
    return windows
