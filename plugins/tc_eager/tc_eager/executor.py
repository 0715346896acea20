"""Sessions over a transformer in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from tc_eager.layers import use_fastest_layers
from torchchat_core.errors import TorchchatError
from torchchat_core.models.attention import CachedAttention, KernelAttention, Segment
from torchchat_core.models.kv_cache import KVCache
from torchchat_core.models.transformer import Transformer
from torchchat_core.models.weights import TORCH_DTYPES
from torchchat_core.quantization.running import prepare
from torchchat_core.sequence_limits import check_append, check_batch, check_tokens, session_limit
from torchchat_core.specs import LoadRequest

if TYPE_CHECKING:
    from torchchat_core.kernels.decoding import TokenDecoder


class StepDecoder(Protocol):
    """Decodes one token of one sequence in some quicker way than the module."""

    def logits(self, token: int, cache: KVCache, extended: bool) -> Tensor:
        """Of the token behind those that the cache holds, which gets its keys and values: float32 [1, vocab], CPU."""


@runtime_checkable
class RowDecoder(StepDecoder, Protocol):
    """Decodes one token of each of several sequences in some quicker way than the module."""

    def logits_of_rows(self, tokens: Sequence[int], caches: Sequence[KVCache], extended: bool) -> Tensor:
        """As `StepDecoder.logits`, a row for each: float32 [n, vocab], CPU."""


class EagerExecutor:
    """Implements `specs.Executor` with all abilities but `fused_sampling`."""

    def load(self, request: LoadRequest) -> EagerModel:
        prepare(request.module, TORCH_DTYPES[request.dtype])
        if use_fastest_layers(request.module):
            return EagerModel(request, KernelAttention, token_decoder(request.module))
        return EagerModel(request, CachedAttention)


def token_decoder(module: Transformer) -> TokenDecoder | None:
    """What decodes one token in one call, where the kernels are loaded and know all of the layers."""
    from torchchat_core.kernels.decoding import TokenDecoder, decodes

    return TokenDecoder.of(module) if decodes(module) else None


class EagerModel:
    """Implements `specs.BatchedModel`."""

    def __init__(self, request: LoadRequest, attention: type[CachedAttention], decoder: StepDecoder | None = None
                 ) -> None:
        module: Transformer = request.module
        self.vocab_size = module.config.vocab_size
        self.max_context = module.config.max_context
        self.device = request.device
        self.dtype = request.dtype
        self._attention = attention
        self._decoder = decoder
        self._module: Transformer | None = module

    def session(self, limit: int | None = None) -> EagerSession:
        limit = session_limit(limit, self.max_context, "the model", "set --max-seq-length within that")
        return EagerSession(self, limit)

    @torch.inference_mode()
    def decode_batch(self, sessions: Sequence[EagerSession], tokens: Sequence[int]) -> Tensor:
        check_batch(sessions, tokens)
        for session in sessions:
            session.check_room(1)
        groups = {session.extended for session in sessions}
        if len(groups) > 1:  # longrope: sequences on both sides of the original context have other angles
            return torch.stack([session.decode(token) for session, token in zip(sessions, tokens, strict=True)])
        logits = self._decoded(sessions, tokens, groups == {True})
        for session in sessions:
            session.cache.advance(1)
        return logits

    def _decoded(self, sessions: Sequence[EagerSession], tokens: Sequence[int], extended: bool) -> Tensor:
        decoder = self._decoder  # which another thread may take away
        if len(tokens) > 1 and isinstance(decoder, RowDecoder):
            check_tokens(tokens, self.vocab_size)
            return decoder.logits_of_rows(tokens, [session.cache for session in sessions], extended)
        segments = [Segment(session.cache, 1) for session in sessions]
        return self.forward(tokens, [session.length for session in sessions], segments, rows=None, extended=extended)

    def forward(self, tokens: Sequence[int], positions: Sequence[int], segments: Sequence[Segment],
                rows: list[int] | None, extended: bool) -> Tensor:
        """One pass of the transformer; logits [rows, vocab], float32 on the CPU."""
        module = self.module
        check_tokens(tokens, self.vocab_size)
        decoder = self._decoder  # which another thread may take away
        if decoder is not None and len(tokens) == 1:
            return decoder.logits(tokens[0], segments[0].cache, extended)
        logits: Tensor = module(
            torch.tensor(tokens, device=self.device), torch.tensor(positions, device=self.device),
            self._attention(module.config, segments),
            rows=None if rows is None else torch.tensor(rows, device=self.device), extended=extended,
        )
        return logits.float().cpu()

    def hidden_states(self, tokens: Sequence[int], positions: Sequence[int], segment: Segment, extended: bool
                      ) -> Tensor:
        """Behind the last norm: [n, hidden], float32 on the CPU."""
        module = self.module
        check_tokens(tokens, self.vocab_size)
        hidden: Tensor = module.model(
            torch.tensor(tokens, device=self.device), torch.tensor(positions, device=self.device),
            self._attention(module.config, [segment]), extended)
        return hidden.float().cpu()

    @property
    def module(self) -> Transformer:
        if self._module is None:
            raise TorchchatError("the model was closed")
        return self._module

    def close(self) -> None:
        self._module = self._decoder = None


class EagerSession:
    """Implements `specs.ScoringSession`, `specs.ForkingSession` and `specs.EmbeddingSession`."""

    def __init__(self, model: EagerModel, limit: int, cache: KVCache | None = None) -> None:
        module = model.module
        dtype = module.model.norm.weight.dtype  # the embedding may be quantised
        self.limit = limit
        self.cache = cache or KVCache(module.config, limit, dtype, torch.device(model.device))
        self.extended = module.model.rotary.extends(limit)
        self._model = model
        self._closed = False

    @property
    def length(self) -> int:
        return self.cache.length

    def prefill(self, tokens: Sequence[int]) -> Tensor:
        return self._append(tokens, [len(tokens) - 1])[0]

    def decode(self, token: int) -> Tensor:
        return self._append([token], None)[0]

    def score(self, tokens: Sequence[int]) -> Tensor:
        return self._append(tokens, None)

    @torch.inference_mode()
    def embed(self, tokens: Sequence[int]) -> Tensor:
        self.check_room(len(tokens))
        positions = range(self.length, self.length + len(tokens))
        states = self._model.hidden_states(tokens, positions, Segment(self.cache, len(tokens)), self.extended)
        self.cache.advance(len(tokens))
        return states

    @torch.inference_mode()
    def fork(self, length: int) -> EagerSession:
        if self._closed:
            raise TorchchatError("the session was closed")
        return EagerSession(self._model, self.limit, self.cache.copy(length))

    def truncate(self, length: int) -> None:
        self.cache.truncate(length)

    def close(self) -> None:
        self._closed = True
        self.cache.release()

    def check_room(self, count: int) -> None:
        """Raises `TorchchatError` where `count` more tokens do not fit."""
        check_append(count, self.length, self.limit, self._closed,
                     "allow more with --max-seq-length where the model can")

    @torch.inference_mode()
    def _append(self, tokens: Sequence[int], rows: list[int] | None) -> Tensor:
        self.check_room(len(tokens))
        positions = range(self.length, self.length + len(tokens))
        segment = Segment(self.cache, len(tokens))
        logits = self._model.forward(tokens, positions, [segment], rows, self.extended)
        self.cache.advance(len(tokens))
        return logits
