"""From a file of text to what quantizers are given of it: windows of token ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torchchat_core.errors import TorchchatError, quoted_path
from torchchat_core.specs import Calibration, Tokenizer

TOKENS = 32768  # that are read of a text unless another number is asked for
LEAST_TOKENS = 128
WINDOW = 512  # tokens of a window; fewer where the model takes fewer, or the text has fewer
PIECE = 1 << 16  # characters that are read and encoded at once


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """A file of plain text in UTF-8, and how much of it is used."""

    path: Path
    tokens: int = TOKENS

    def __post_init__(self) -> None:
        if self.tokens < LEAST_TOKENS:
            raise TorchchatError(f"calibration with {self.tokens} tokens; {LEAST_TOKENS} are the least")

    def described(self, calibration: Calibration) -> dict[str, Any]:
        """What layers were made with, for the manifest of a folder: the file's name, and how many tokens, BOS
        included, were read of it."""
        return {"text": self.path.name, "tokens": sum(map(len, calibration.windows))}


def read_calibration(text: CalibrationText, tokenizer: Tokenizer, max_context: int) -> Calibration:
    """The beginning of the text as windows, each a sequence of its own with BOS before it where the model has one.

    What does not fill a last window is left out. Raises `TorchchatError` for a file that cannot be read, is not UTF-8,
    or is too short.
    """
    start = (tokenizer.bos_id,) if tokenizer.adds_bos and tokenizer.bos_id is not None else ()
    ids = tuple(islice(_encoded(text.path, tokenizer), text.tokens))
    if len(ids) < LEAST_TOKENS:
        raise TorchchatError(f"the calibration text {quoted_path(str(text.path))} has {len(ids)} tokens; "
                             f"{LEAST_TOKENS} are the "
                             "least", "give a longer text, of the kind that the model is used for")
    length = min(WINDOW, max_context, len(ids) + len(start)) - len(start)
    return Calibration(windows=tuple((*start, *ids[place : place + length])
                                     for place in range(0, len(ids) - length + 1, length)))


def _encoded(path: Path, tokenizer: Tokenizer) -> Iterator[int]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            while piece := file.read(PIECE):
                yield from tokenizer.encode(piece)
    except OSError as error:
        raise TorchchatError(f"the calibration text {quoted_path(str(path))} cannot be read: {error.strerror}"
                             ) from None
    except UnicodeDecodeError:
        raise TorchchatError(f"the calibration text {quoted_path(str(path))} is not UTF-8", "give a plain text"
                             ) from None
