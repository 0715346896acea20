"""POST /tokenize and /detokenize."""

from __future__ import annotations

import asyncio

from starlette.responses import Response

from torchchat_core.conversation import encode_plain
from torchchat_core.server.chat import chat_prompt, tool_use
from torchchat_core.server.errors import ApiError
from torchchat_core.server.exchange import Exchange, json_response
from torchchat_core.server.messages import template_messages
from torchchat_core.server.schemas import ChatRequest, DetokenizeRequest, TokenizeRequest

MAX_TOKENS = 1 << 18  # that /tokenize counts, if the model's context is not longer


async def tokenize(exchange: Exchange, body: TokenizeRequest) -> Response:
    tokens = await exchange.prepare(1, _tokens, exchange, body)
    return json_response({"tokens": tokens, "count": len(tokens),
                          "max_model_len": exchange.engine.opened.max_seq_length})


def _tokens(exchange: Exchange, body: TokenizeRequest) -> list[int]:
    text_format = exchange.text_format("prompt" if body.messages is None else "messages", MAX_TOKENS)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", "prompt", "invalid_value")
    if body.messages is not None:
        chat = ChatRequest(model=exchange.model, messages=body.messages, tools=body.tools)
        messages = template_messages(chat.messages, text_format.template)
        return chat_prompt(text_format, messages, tool_use(chat, text_format), {})[0]
    if body.tools is not None:
        raise ApiError(400, "tools need messages", "tools", "invalid_value")
    text = body.prompt or ""
    if body.add_special_tokens:
        return encode_plain(text, text_format.tokenizer, special=True)
    return text_format.tokenizer.encode(text, special=True)


async def detokenize(exchange: Exchange, body: DetokenizeRequest) -> Response:
    size = exchange.engine.opened.model.vocab_size
    outside = [token for token in body.tokens if token >= size]
    if outside:
        raise ApiError(400, f"token {outside[0]} is outside the vocabulary, which ends at {size - 1}", "tokens",
                       "invalid_value")
    text = await asyncio.to_thread(exchange.engine.opened.text_format.tokenizer.decode, body.tokens)
    return json_response({"prompt": text})
