"""How far one model is from another: mean KL divergence and agreement over the same positions of a text.

    KL(reference || other) = sum over the vocabulary of p * (log p - log q)        in nats, mean over the positions

One model is loaded at a time, so that whatever can be run can be compared: what the reference says is written to a
file, float32, 4 * positions * vocabulary bytes (2000 positions of a vocabulary of 128,000: 1 GB), and read back block
by block. The file lies in torchchat's cache folder, since /tmp is memory on many systems, and has no name: nothing is
left of it, whatever happens.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import numpy as np
import torch
from torch import Tensor

from torchchat_core.amounts import bytes_text
from torchchat_core.errors import TorchchatError
from torchchat_core.measure.perplexity import Block
from torchchat_core.small_files import cache_folder, make_folder


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """How far a model is from its reference on a text."""

    mean_kl: float  # nats for each token
    top_1: float  # share of the positions at which both find the same token likeliest
    tokens: int


class Reference:
    """What the reference says, on disk, position by position: log-probabilities or logits, as its user likes."""

    def __init__(self, file: IO[bytes], vocab_size: int) -> None:
        self._file = file
        self._vocab_size = vocab_size

    def recorded(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The blocks as they come, each of them kept."""
        for block in blocks:
            self.keep(block.log_probabilities)
            yield block

    def keep(self, rows: Tensor) -> None:
        """Appends rows [positions, vocab], as float32."""
        self._file.write(rows.float().numpy().tobytes())

    def positions(self, count: int) -> Tensor:
        """[count, vocab] float32: what was kept of the next positions."""
        wanted = 4 * count * self._vocab_size
        content = self._file.read(wanted)
        if len(content) != wanted:
            raise TorchchatError("the two models do not see the same positions of the text",
                                 "compare models of one vocabulary")
        return torch.from_numpy(np.frombuffer(content, dtype=np.float32).copy()).view(count, self._vocab_size)

    def rewind(self) -> None:
        """From now on the first position is the next one."""
        self._file.seek(0)


@contextmanager
def reference_file(positions: int, vocab_size: int) -> Iterator[Reference]:
    """Room for what a reference says. Raises `TorchchatError` where the disk has too little of it."""
    folder, needed = cache_folder(), 4 * positions * vocab_size
    make_folder(folder)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise TorchchatError(f"the figures of the first model need {bytes_text(needed)} in {folder}; "
                             f"{bytes_text(free)} are free", "measure on fewer characters, or set XDG_CACHE_HOME")
    with tempfile.TemporaryFile(dir=folder) as file:
        yield Reference(file, vocab_size)


class DivergenceSum:
    """Adds up how far blocks are from a reference while something else reads them."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._kl = 0.0
        self._agreed = 0
        self._tokens = 0

    def observed(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The blocks as they come, each compared with the reference's at the same positions."""
        self._reference.rewind()
        for block in blocks:
            self._add(self._reference.positions(len(block.expected)), block.log_probabilities.float())
            yield block

    def _add(self, reference: Tensor, other: Tensor) -> None:
        probable, difference = reference.double().exp(), reference.double() - other.double()
        # a token without probability adds nothing, even where the difference is not a number
        self._kl += float(torch.where(probable > 0, probable * difference, 0.0).sum())
        self._agreed += int((reference.argmax(-1) == other.argmax(-1)).sum())
        self._tokens += len(reference)

    @property
    def result(self) -> Divergence:
        """Raises `TorchchatError` where the model rules out what to the reference is possible."""
        if not math.isfinite(self._kl):
            raise TorchchatError("the KL divergence to the unquantised model is not finite: the model gives no "
                                 "probability at all to tokens that may follow", "the recipe may be damaging it")
        mean = max(0.0, self._kl / self._tokens)  # the reference was kept as float32: nothing may come out below it
        return Divergence(mean_kl=mean, top_1=self._agreed / self._tokens, tokens=self._tokens)
