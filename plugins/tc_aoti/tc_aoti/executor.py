"""Running a file: one loaded file serves many sessions, each of which brings its own cache."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tc_aoti.loading import (
    LARGEST_SIZE,
    LoadedProgram,
    check_machine,
    decoder_of,
    load_kernels,
    weights_of,
)
from torchchat_core.artifacts import Artifact, open_artifact
from torchchat_core.errors import TorchchatError
from torchchat_core.kernels.decoding import TokenDecoder
from torchchat_core.manifest_fields import Fields
from torchchat_core.models.config import ModelConfig
from torchchat_core.models.kv_cache import KVCache
from torchchat_core.models.weights import TORCH_DTYPES
from torchchat_core.sequence_limits import check_append, check_batch, check_tokens, session_limit
from torchchat_core.specs import LoadRequest

SEVERAL, ONE = "any", "decode"  # programs: for any number of tokens, and for a single one


@runtime_checkable
class RowDecoder(Protocol):
    """Decodes one token of each of several sequences in one step."""

    def logits_of_rows(self, tokens: Sequence[int], caches: Sequence[KVCache], extended: bool) -> Tensor:
        """Of the tokens behind those that the caches hold: float32 [n, vocab] on the CPU."""


class AotiExecutor:
    """Implements `specs.Executor` with the abilities `score` and `batch`."""

    def load(self, request: LoadRequest) -> AotiModel:
        """Raises `TorchchatError` where the file is damaged, or not for this machine or this PyTorch."""
        if request.artifact is None:
            raise TorchchatError("the executor 'aoti' runs exported files, and was given a model in memory",
                                 "choose another executor, or export the model first")
        artifact = open_artifact(request.artifact)
        artifact.check_target()
        runtime = Fields(artifact.manifest.runtime, f"the runtime of {artifact.path.name}")
        check_machine(artifact, runtime)
        with tempfile.TemporaryDirectory(prefix="torchchat-") as folder:  # libraries are loaded by path
            load_kernels(artifact, runtime, Path(folder))
            weights = weights_of(artifact, runtime)
            decoder, described = decoder_of(artifact, runtime, weights), runtime.inner("programs")
            needed = [SEVERAL] if decoder is not None else [SEVERAL, ONE]
            programs = {name: LoadedProgram(artifact, described.inner(name), weights, Path(folder) / name)
                        for name in needed if name in described.content}
        if SEVERAL not in programs:
            raise TorchchatError(f"{artifact.path.name} has no program for several tokens", "export it again")
        return AotiModel(artifact, programs, decoder, runtime.optional_number("original_context", 1, LARGEST_SIZE))


class AotiModel:
    """Implements `specs.BatchedModel`."""

    def __init__(self, artifact: Artifact, programs: Mapping[str, LoadedProgram], decoder: TokenDecoder | None,
                 original_context: int | None) -> None:
        manifest = artifact.manifest
        self.config: ModelConfig = manifest.config
        self.vocab_size = manifest.config.vocab_size
        self.max_context = manifest.max_seq_length
        self.device, self.dtype = manifest.target.device, manifest.dtype
        self._original_context = original_context
        self._programs, self._decoder = programs, decoder

    def session(self, limit: int | None = None) -> AotiSession:
        limit = session_limit(limit, self.max_context, "the file", "set --max-seq-length within that")
        extended = self._original_context is not None and limit > self._original_context
        return AotiSession(self, limit, extended)

    def run(self, tokens: Sequence[int], rows: Sequence[int], cache: KVCache, extended: bool) -> Tensor:
        """Logits [rows, vocab], float32 on the CPU, of the tokens that stand behind those that the cache holds."""
        programs, decoder = self._programs, self._decoder  # which another thread may take away
        if not programs:
            raise TorchchatError("the model was closed")
        check_tokens(tokens, self.vocab_size)
        if len(tokens) == 1 and decoder is not None:
            return decoder.logits(tokens[0], cache, extended)
        keys, values = cache.all_rooms(len(tokens))
        def on_device(numbers: Sequence[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int64, device=self.device)

        alone = len(tokens) == 1 and ONE in programs
        program = programs[ONE if alone else SEVERAL]
        inputs = [on_device(tokens), on_device([cache.length, extended])]
        if program.sees:
            inputs.append(torch.arange(cache.length + len(tokens), device=self.device))
        if not alone:
            inputs.append(on_device(rows))
        return program.run([*inputs, *keys, *values]).cpu()

    @torch.inference_mode()
    def decode_batch(self, sessions: Sequence[AotiSession], tokens: Sequence[int]) -> Tensor:
        """In one step where core's decoder runs the file, else one sequence after the other."""
        check_batch(sessions, tokens)
        for session in sessions:
            session.check_room(1)
        check_tokens(tokens, self.vocab_size)
        groups = {session.extended for session in sessions}
        decoder = self._decoder  # which another thread may take away
        if len(groups) > 1 or not isinstance(decoder, RowDecoder):
            return torch.stack([session.decode(token) for session, token in zip(sessions, tokens, strict=True)])
        logits = decoder.logits_of_rows(tokens, [session.cache for session in sessions], groups == {True})
        for session in sessions:
            session.cache.advance(1)
        return logits

    def close(self) -> None:
        self._programs, self._decoder = {}, None


class AotiSession:
    """Implements `specs.ScoringSession`."""

    def __init__(self, model: AotiModel, limit: int, extended: bool) -> None:
        self.limit = limit
        self.extended = extended
        self._model, self._closed = model, False
        self.cache = KVCache(model.config, limit, TORCH_DTYPES[model.dtype], torch.device(model.device))

    @property
    def length(self) -> int:
        return self.cache.length

    def prefill(self, tokens: Sequence[int]) -> Tensor:
        return self._append(tokens, [len(tokens) - 1])[0]

    def decode(self, token: int) -> Tensor:
        return self._append([token], [0])[0]

    def score(self, tokens: Sequence[int]) -> Tensor:
        return self._append(tokens, range(len(tokens)))

    def truncate(self, length: int) -> None:
        self.cache.truncate(length)

    def close(self) -> None:
        self._closed = True
        self.cache.release()

    def check_room(self, count: int) -> None:
        """Raises `TorchchatError` where `count` more tokens do not fit."""
        check_append(count, self.length, self.limit, self._closed,
                     "allow more with --max-seq-length where the file can")

    @torch.inference_mode()
    def _append(self, tokens: Sequence[int], rows: Sequence[int]) -> Tensor:
        self.check_room(len(tokens))
        logits = self._model.run(tokens, rows, self.cache, self.extended)
        self.cache.advance(len(tokens))
        return logits
