"""Long texts of strangers: read and encoded one at a time, away from the event loop, and no further than can fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torchchat_core.server.errors import ApiError, ClientGone, refused
from torchchat_core.server.logs import log_failure
from torchchat_core.specs import Tokenizer
from torchchat_core.tokenizers.faults import TokenizerError
from torchchat_core.tokenizers.slicing import UncutTextError

LARGE_BODY = 1 << 16  # bytes; larger ones wait for each other
SHORT_TEXT = 4096  # characters that are encoded at once, whatever the limit
MOST_VALUES = (1 << 20) + (1 << 16)  # numbers, texts and other values in a body
MOST_CONTAINERS = 1 << 17  # lists and objects in a body


class BoundedTokenizer:
    """A tokenizer that encodes no more than `limit` tokens of a text, and stops when nobody waits for them.

    It takes the place of the tokenizer that it is made of where prompts are encoded. Raises `ApiError` 400 for a text
    that has more tokens, 500 where the tokenizer itself fails.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int, param: str, stopped: Callable[[], bool]) -> None:
        self._tokenizer, self._limit, self._param, self._stopped = tokenizer, limit, param, stopped
        self._longest: int | None = getattr(tokenizer, "longest_token", None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def check_size(self, text: str) -> None:
        """Raise `ApiError` 400 for a text that has more than `limit` tokens however it is encoded."""
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
            for some in self._slices(text, **special):
                if len(ids) > self._limit:  # and there is more
                    raise self._too_long()
                if self._stopped():
                    raise ClientGone
                ids += some
        except UncutTextError as error:
            raise refused(error, self._param) from None
        except TokenizerError as error:
            log_failure("a text could not be encoded", error)
            raise ApiError(500, "the model's tokenizer fails at this text; the server's log says more") from None
        return ids

    def _slices(self, text: str | Sequence[str | int], **special: bool) -> Any:
        slices = getattr(self._tokenizer, "encode_slices", None)  # tokenizers of plugins may lack it
        if slices is not None:
            return slices(text, **special)
        if isinstance(text, str):
            return [self._tokenizer.encode(text, **special)]
        return ([part] if isinstance(part, int) else self._tokenizer.encode(part) for part in text)

    def _too_long(self) -> ApiError:
        return ApiError(400, f"{self._param} has more than {self._limit} tokens, which are the most that are possible",
                        self._param, "context_length_exceeded")


def check_values(body: bytes) -> None:
    """Raise `ApiError` 400 for a large body that consists of so many values that they would take much memory."""
    if len(body) <= LARGE_BODY:
        return
    bare = body.replace(rb"\\", b"").replace(rb"\"", b"")  # in which every quotation mark begins or ends a text
    texts = bare.count(b'"')
    outside = bare.split(b'"')[::2] if texts <= 4 * MOST_VALUES else []
    values = sum(part.count(b",") for part in outside)
    containers = sum(part.count(b"[") + part.count(b"{") for part in outside)
    if texts > 4 * MOST_VALUES or values + containers > MOST_VALUES or containers > MOST_CONTAINERS:
        raise ApiError(400, f"the body has more than {MOST_VALUES} values, or more than {MOST_CONTAINERS} lists and "
                            "objects, which are the most that this server takes")
