"""Limit long texts from clients: large bodies are processed one at a time, and encoding stops at the token limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torchchat_core.server.errors import ApiError, ClientGone, refused
from torchchat_core.server.logs import log_failure
from torchchat_core.specs import Tokenizer
from torchchat_core.tokenizers.faults import TokenizerError
from torchchat_core.tokenizers.slicing import UncutTextError

LARGE_BODY = 1 << 16  # bytes; larger bodies are processed one at a time
SHORT_TEXT = 4096  # characters; shorter texts are always encoded
MAX_VALUES = (1 << 20) + (1 << 16)  # numbers, strings and other values in a body
MAX_CONTAINERS = 1 << 17  # arrays and objects in a body


class BoundedTokenizer:
    """A wrapper that encodes at most `limit` tokens, and stops if `stopped` returns True.

    The server uses it in place of the wrapped tokenizer to encode prompts. Raises `ApiError` 400 for a text with more
    tokens, and 500 if the tokenizer itself fails.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int, param: str, stopped: Callable[[], bool]) -> None:
        self._tokenizer, self._limit, self._param, self._stopped = tokenizer, limit, param, stopped
        self._longest: int | None = getattr(tokenizer, "longest_token", None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def check_size(self, text: str) -> None:
        """Raise `ApiError` 400 if the length of the text alone proves that it has more than `limit` tokens."""
        if len(text) > SHORT_TEXT and self._longest is not None and len(text) > self._limit * self._longest:
            raise self._too_long()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        self.check_size(text)
        return self._encoded(text, special=special)

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        for part in parts:
            if isinstance(part, str):
                self.check_size(part)
        return self._encoded(parts)

    def _encoded(self, text: str | Sequence[str | int], **special: bool) -> list[int]:
        ids: list[int] = []
        try:
            for slice_ids in self._slices(text, **special):
                if len(ids) > self._limit:  # and there is more
                    raise self._too_long()
                if self._stopped():
                    raise ClientGone
                ids += slice_ids
        except UncutTextError as error:
            raise refused(error, self._param) from None
        except TokenizerError as error:
            log_failure("a text could not be encoded", error)
            raise ApiError(500, "the model's tokenizer failed on this text; see the server's log") from None
        return ids

    def _slices(self, text: str | Sequence[str | int], **special: bool) -> Any:
        slices = getattr(self._tokenizer, "encode_slices", None)  # optional for plugins' tokenizers
        if slices is not None:
            return slices(text, **special)
        if isinstance(text, str):
            return [self._tokenizer.encode(text, **special)]
        return ([part] if isinstance(part, int) else self._tokenizer.encode(part) for part in text)

    def _too_long(self) -> ApiError:
        return ApiError(400, f"{self._param} has more than {self._limit} tokens, the maximum", self._param,
                        "context_length_exceeded")


def check_values(body: bytes) -> None:
    """Raise `ApiError` 400 for a large body with so many values that parsing it would take too much memory."""
    if len(body) <= LARGE_BODY:
        return
    bare = body.replace(rb"\\", b"").replace(rb"\"", b"")  # now every quotation mark starts or ends a string
    quotes = bare.count(b'"')
    outside = bare.split(b'"')[::2] if quotes <= 4 * MAX_VALUES else []
    values = sum(part.count(b",") for part in outside)
    containers = sum(part.count(b"[") + part.count(b"{") for part in outside)
    if quotes > 4 * MAX_VALUES or values + containers > MAX_VALUES or containers > MAX_CONTAINERS:
        raise ApiError(400, f"the body has more than {MAX_VALUES} values, or more than {MAX_CONTAINERS} arrays and "
                            "objects, the maximum")
