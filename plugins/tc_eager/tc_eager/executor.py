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

ROWS_OF_A_PROMPT = 16  # tokens up to which reading the weights is what takes the time, as it is for one


class StepDecoder(Protocol):
    """Decodes one token of one sequence in some quicker way than the module."""

    def logits(self, token: int, cache: KVCache, extended: bool) -> Tensor:
        """Of the token behind those that the cache holds, which gets its keys and values: float32 [1, vocab], CPU."""


@runtime_checkable
class RowDecoder(StepDecoder, Protocol):
    """Decodes tokens of several sequences in some quicker way than the module."""

    def logits_of_rows(self, tokens: Sequence[int], caches: Sequence[KVCache], extended: bool) -> Tensor:
        """As `StepDecoder.logits`, a row for each: float32 [n, vocab], CPU."""

    def logits_of_prompts(self, prompts: Sequence[Sequence[int]], caches: Sequence[KVCache], extended: bool) -> Tensor:
        """Of the last of some tokens for each, as if they came one by one: float32 [n, vocab], CPU."""


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
    """Implements `specs.PromptBatchingModel`."""

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

    @torch.inference_mode()
    def prefill_batch(self, sessions: Sequence[EagerSession], prompts: Sequence[Sequence[int]]) -> Tensor:
        """In one call where all are short, else one after the other, which gives the same."""
        check_batch(sessions, prompts)
        for session, prompt in zip(sessions, prompts, strict=True):
            session.check_room(len(prompt))
            check_tokens(prompt, self.vocab_size)
        groups = {session.extended for session in sessions}
        decoder = self._rows_decoder(max(map(len, prompts)))
        if len(groups) > 1 or decoder is None:
            return torch.stack([session.prefill(prompt) for session, prompt in zip(sessions, prompts, strict=True)])
        logits = decoder.logits_of_prompts(prompts, [session.cache for session in sessions], groups == {True})
        for session, prompt in zip(sessions, prompts, strict=True):
            session.cache.advance(len(prompt))
        return logits

    def _rows_decoder(self, longest: int) -> RowDecoder | None:
        """What computes prompts of up to so many tokens, where it is worth it."""
        decoder = self._decoder  # which another thread may take away
        return decoder if isinstance(decoder, RowDecoder) and longest <= ROWS_OF_A_PROMPT else None

    def prompt_logits(self, tokens: Sequence[int], positions: Sequence[int], segment: Segment, extended: bool
                      ) -> Tensor:
        """Of the last of the tokens: [1, vocab]."""
        decoder = self._rows_decoder(len(tokens))
        if decoder is None or len(tokens) == 1:
            return self.forward(tokens, positions, [segment], [len(tokens) - 1], extended)
        check_tokens(tokens, self.vocab_size)
        return decoder.logits_of_prompts([tokens], [segment.cache], extended)

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
        return self._append(tokens, last=True)[0]

    def decode(self, token: int) -> Tensor:
        return self._append([token])[0]

    def score(self, tokens: Sequence[int]) -> Tensor:
        return self._append(tokens)

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
    def _append(self, tokens: Sequence[int], last: bool = False) -> Tensor:
        """Logits of all tokens, or of the `last` alone: [n or 1, vocab]."""
        self.check_room(len(tokens))
        positions = range(self.length, self.length + len(tokens))
        segment = Segment(self.cache, len(tokens))
        logits = self._model.prompt_logits(tokens, positions, segment, self.extended) if last else \
            self._model.forward(tokens, positions, [segment], None, self.extended)
        self.cache.advance(len(tokens))
        return logits
