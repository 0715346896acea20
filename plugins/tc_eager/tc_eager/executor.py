"""Sessions over a transformer in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from tc_eager.layers import use_fastest_layers
from torchchat_core import kernels
from torchchat_core.errors import TorchchatError
from torchchat_core.kernels.serial import is_small, one_thread
from torchchat_core.models.attention import CachedAttention, KernelAttention, Segment
from torchchat_core.models.kv_cache import KVCache
from torchchat_core.models.transformer import Transformer
from torchchat_core.models.weights import TORCH_DTYPES
from torchchat_core.quantization.running import prepare
from torchchat_core.sequence_limits import check_append, check_batch, check_tokens, session_limit
from torchchat_core.specs import LoadRequest

if TYPE_CHECKING:
    from torchchat_core.kernels.decoding import TokenDecoder

TOKENS_AT_ONCE = 512  # chunk size for recomputing a prompt
ROWS_OF_A_PROMPT = 16  # tokens up to which reading the weights is what takes the time, as it is for one


class StepDecoder(Protocol):
    """Decodes one token of one sequence in some quicker way than the module."""

    def logits(self, token: int, cache: KVCache, extended: int) -> Tensor:
        """Of the token behind those that the cache holds, which gets its keys and values: float32 [1, vocab], CPU."""


@runtime_checkable
class RowDecoder(StepDecoder, Protocol):
    """Decodes tokens of several sequences in some quicker way than the module."""

    def logits_of_rows(self, tokens: Sequence[int], caches: Sequence[KVCache], extended: int) -> Tensor:
        """As `StepDecoder.logits`, a row for each: float32 [n, vocab], CPU."""

    def logits_of_prompts(self, prompts: Sequence[Sequence[int]], caches: Sequence[KVCache], extended: int) -> Tensor:
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


def _threads_for(module: Transformer, attention: type[CachedAttention]) -> Callable[[], AbstractContextManager[None]]:
    """Return the context for a forward pass of the module.

    Only large models without kernels use OpenMP, because its threads wait for each other at every operation.
    """
    if attention is KernelAttention:
        return kernels.engine_threads
    return one_thread if is_small(module) else nullcontext


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
        self._threads = _threads_for(module, attention)
        self._decoder = decoder
        self._module: Transformer | None = module
        self.is_dynamic = module.model.rotary.dynamic is not None

    def session(self, limit: int | None = None) -> EagerSession:
        limit = session_limit(limit, self.max_context, "the model", "set --max-seq-length within that")
        return EagerSession(self, limit)

    @torch.inference_mode()
    def decode_batch(self, sessions: Sequence[EagerSession], tokens: Sequence[int]) -> Tensor:
        check_batch(sessions, tokens)
        for session in sessions:
            session.check_room(1)
        groups = {session.extension(1) for session in sessions}
        if len(groups) > 1 or self.is_dynamic:  # short and long sequences have different frequencies
            return torch.stack([session.decode(token) for session, token in zip(sessions, tokens, strict=True)])
        logits = self._decoded(sessions, tokens, groups.pop())
        for session in sessions:
            session.cache.advance(1)
        return logits

    def _decoded(self, sessions: Sequence[EagerSession], tokens: Sequence[int], extended: int) -> Tensor:
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
        groups = {session.extension(len(prompt)) for session, prompt in zip(sessions, prompts, strict=True)}
        decoder = self._rows_decoder(max(map(len, prompts)))
        if len(groups) > 1 or self.is_dynamic or decoder is None:
            return torch.stack([session.prefill(prompt) for session, prompt in zip(sessions, prompts, strict=True)])
        logits = decoder.logits_of_prompts(prompts, [session.cache for session in sessions], groups.pop())
        for session, prompt in zip(sessions, prompts, strict=True):
            session.cache.advance(len(prompt))
        return logits

    def _rows_decoder(self, longest: int) -> RowDecoder | None:
        """What computes prompts of up to so many tokens, where it is worth it."""
        decoder = self._decoder  # which another thread may take away
        return decoder if isinstance(decoder, RowDecoder) and longest <= ROWS_OF_A_PROMPT else None

    def prompt_logits(self, tokens: Sequence[int], positions: Sequence[int], segment: Segment, extended: int
                      ) -> Tensor:
        """Of the last of the tokens: [1, vocab]."""
        decoder = self._rows_decoder(len(tokens))
        if decoder is None or len(tokens) == 1 or (self.is_dynamic and extended):
            return self.forward(tokens, positions, [segment], [len(tokens) - 1], extended)
        check_tokens(tokens, self.vocab_size)
        return decoder.logits_of_prompts([tokens], [segment.cache], extended)

    def forward(self, tokens: Sequence[int], positions: Sequence[int], segments: Sequence[Segment],
                rows: list[int] | None, extended: int) -> Tensor:
        """One pass of the transformer; logits [rows, vocab], float32 on the CPU."""
        module = self.module
        check_tokens(tokens, self.vocab_size)
        decoder = self._decoder  # which another thread may take away
        if decoder is not None and len(tokens) == 1 and not (self.is_dynamic and extended > positions[0] + 1):
            return decoder.logits(tokens[0], segments[0].cache, extended)
        with self._threads():
            logits: Tensor = module(
                torch.tensor(tokens, device=self.device), torch.tensor(positions, device=self.device),
                self._attention(module.config, segments),
                rows=None if rows is None else torch.tensor(rows, device=self.device), extended=extended,
            )
            return logits.float().cpu()

    def hidden_states(self, tokens: Sequence[int], positions: Sequence[int], segment: Segment, extended: int
                      ) -> Tensor:
        """Behind the last norm: [n, hidden], float32 on the CPU."""
        module = self.module
        check_tokens(tokens, self.vocab_size)
        with self._threads():
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
        self._rotary = module.model.rotary
        self._model = model
        self._closed = False
        # With dynamic rope scaling, for recomputing a prompt: the tokens in the cache, and whether any of its keys were
        # rotated with other frequencies than those of the original context.
        self._tokens: list[int] = []
        self._stretched = False

    @property
    def length(self) -> int:
        return self.cache.length

    def prefill(self, tokens: Sequence[int]) -> Tensor:
        return self._append(tokens, is_prompt=True, last=True)[0]

    def decode(self, token: int) -> Tensor:
        return self._append([token], is_prompt=False)[0]

    def score(self, tokens: Sequence[int]) -> Tensor:
        return self._append(tokens, is_prompt=True)

    @torch.inference_mode()
    def embed(self, tokens: Sequence[int]) -> Tensor:
        self.check_room(len(tokens))
        extended = self._aligned(len(tokens), is_prompt=True)
        positions = range(self.length, self.length + len(tokens))
        states = self._model.hidden_states(tokens, positions, Segment(self.cache, len(tokens)), extended)
        self._advance(tokens, extended)
        return states

    @torch.inference_mode()
    def fork(self, length: int) -> EagerSession:
        if self._closed:
            raise TorchchatError("the session was closed")
        copied = EagerSession(self._model, self.limit, self.cache.copy(length))
        copied._tokens, copied._stretched = self._tokens[:length], self._stretched
        return copied

    def truncate(self, length: int) -> None:
        self.cache.truncate(length)

    def close(self) -> None:
        self._closed = True
        self.cache.release()

    def check_room(self, count: int) -> None:
        """Raises `TorchchatError` where `count` more tokens do not fit."""
        check_append(count, self.length, self.limit, self._closed,
                     "allow more with --max-seq-length where the model can")

    def extension(self, count: int) -> int:
        """Return which rotary frequencies a step of `count` tokens uses: see `RotaryEmbedding.extension`."""
        return self._rotary.extension(self.limit, self.length + count)

    @torch.inference_mode()
    def _append(self, tokens: Sequence[int], is_prompt: bool, last: bool = False) -> Tensor:
        """Logits of all tokens, or of the `last` alone: [n or 1, vocab]."""
        self.check_room(len(tokens))
        extended = self._aligned(len(tokens), is_prompt)
        positions = range(self.length, self.length + len(tokens))
        segment = Segment(self.cache, len(tokens))
        logits = self._model.prompt_logits(tokens, positions, segment, extended) if last else \
            self._model.forward(tokens, positions, [segment], None, extended)
        self._advance(tokens, extended)
        return logits

    def _advance(self, tokens: Sequence[int], extended: int) -> None:
        self.cache.advance(len(tokens))
        if self._model.is_dynamic:
            self._tokens.extend(tokens)
            self._stretched = self._stretched or extended > 0

    def _aligned(self, count: int, is_prompt: bool) -> int:
        """Return `extension(count)`. With dynamic scaling, prepare the cache for a step with those frequencies.

        A prompt that ends beyond the original context is computed as a whole, with the frequencies of its length,
        whatever part of it is in the cache, so that the answer does not depend on earlier prompts. A decoded token
        uses the frequencies of the new length and leaves the cached keys as they are, as in transformers.
        """
        extended = self.extension(count)
        if not self._model.is_dynamic:
            return extended
        del self._tokens[self.length :]  # tokens of truncated or interrupted steps
        if self.length and (is_prompt if extended else self._stretched):
            self._recompute(extended)
        self._stretched = self._stretched and self.length > 0
        return extended

    def _recompute(self, extended: int) -> None:
        """Recompute the keys and values of all tokens with these frequencies."""
        tokens, self._tokens = self._tokens, []
        self.cache.truncate(0)
        self._stretched = extended > 0
        for start in range(0, len(tokens), TOKENS_AT_ONCE):
            part = tokens[start : start + TOKENS_AT_ONCE]
            positions = range(start, start + len(part))
            self._model.forward(part, positions, [Segment(self.cache, len(part))], [len(part) - 1], extended)
            self._advance(part, extended)
