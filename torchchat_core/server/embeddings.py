"""POST /v1/embeddings: the mean of a text's hidden states behind the last norm, scaled to length 1."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import cast

import torch
from starlette.responses import Response
from torch import Tensor

from torchchat_core.errors import TorchchatError
from torchchat_core.generation import PREFILL_CHUNK
from torchchat_core.server.completions import prompts_of
from torchchat_core.server.errors import ApiError
from torchchat_core.server.exchange import Exchange, json_response
from torchchat_core.server.schemas import EmbeddingRequest
from torchchat_core.specs import EmbeddingSession, LoadedModel


async def answer(exchange: Exchange, body: EmbeddingRequest) -> Response:
    opened = exchange.engine.opened
    try:
        opened.executor.require("embed")
    except TorchchatError as error:
        raise ApiError(400, error.message, "model", "unsupported_parameter") from None
    texts = await prompts_of(body.input, exchange, "input")
    for text in texts:
        exchange.check_prompt(text, "input")
    vectors = await exchange.watched(exchange.engine.call_for_each(embed, texts))
    count = sum(map(len, texts))
    return json_response({
        "object": "list", "model": body.model, "usage": {"prompt_tokens": count, "total_tokens": count},
        "data": [{"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
                 for index, vector in enumerate(vectors)]})


def embed(model: LoadedModel, tokens: Sequence[int]) -> Tensor:
    """The vector [hidden] of a text, of length 1, by an executor with the ability `embed`."""
    session = cast(EmbeddingSession, model.session(len(tokens)))
    try:
        parts = [session.embed(tokens[start : start + PREFILL_CHUNK]).double().sum(0)
                 for start in range(0, len(tokens), PREFILL_CHUNK)]
    finally:
        session.close()
    return torch.nn.functional.normalize(torch.stack(parts).sum(0), dim=0).float()


def _encoded(vector: Tensor, form: str | None) -> list[float] | str:
    """As numbers, or as base64 of little-endian float32."""
    if form == "base64":
        return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers
