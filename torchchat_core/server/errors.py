"""Errors as OpenAI's interface has them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from torchchat_core.errors import LONGEST_MESSAGE, QUOTED_LENGTH, TorchchatError, quoted, shortened

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error",
         503: "server_error", 504: "timeout_error"}
SURROGATE = re.compile("[\ud800-\udfff]")
STOPPING = (asyncio.CancelledError, KeyboardInterrupt, SystemExit, GeneratorExit)  # not faults; always re-raised
UNKNOWN_FIELD = "extra_forbidden"
TOO_MANY = "too_long"  # of lists and objects
UNSUPPORTED = "none_required"  # of fields that are declared as null alone


class ApiError(Exception):
    """The answer to a request that cannot be met: an HTTP status, and what is wrong with which field (`param`)."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        self.status = status
        self.message = shortened(message, LONGEST_MESSAGE)
        super().__init__(self.message)
        self.param = None if param is None else shortened(param)
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class ClientGone(Exception):
    """Nobody reads the answer any more."""


def server_ends() -> ApiError:
    """For those who wait when it does."""
    return ApiError(503, "the server ends; try again later")


def refused(error: TorchchatError, param: str | None = None) -> ApiError:
    """A 400 for what core refuses."""
    return ApiError(400, str(error), param)


def malformed(error: ValidationError, body: object) -> ApiError:
    """Return a 400 that names the wrong field: of several, the one that lies deepest in `body`.

    A list with too many elements comes first: the other errors say that it is of another type than it may be.
    """
    found = [(_path(each["loc"], body), each) for each in error.errors(include_url=False)]
    places, first = max(found, key=lambda pair: (pair[1]["type"] == TOO_MANY, len(pair[0])))  # the first one of equals
    path = _field_path(places)
    if first["type"] == "json_invalid":
        broken = _invalid_text(body)
        if broken is not None:
            path = _field_path(broken)
            return ApiError(400, f"{path or 'the body'} has an unpaired surrogate, which is not valid Unicode; split "
                                 "texts only between whole characters", path or None, "invalid_value")
        return ApiError(400, f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    if first["type"] == UNKNOWN_FIELD:
        return ApiError(400, f"unknown field {quoted(path)}", path, "unknown_parameter")
    if first["type"] == UNSUPPORTED:
        return ApiError(400, f"{quoted(path)} is not supported by this server; leave it out", path,
                        "unsupported_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"the field {quoted(path)} is missing", path, "missing_required_parameter")
    return ApiError(400, f"{path or 'the body'}: {_fault(first)}", path or None, "invalid_value")


def _fault(error: ErrorDetails) -> str:
    """Return what pydantic says about a value, with our words where its own are long or unclear."""
    context = error.get("ctx", {})
    if error["type"] == TOO_MANY and context.get("actual_length") is not None:
        return f"it has {context['actual_length']} elements; at most {context['max_length']} are possible"
    if error["type"] == "union_tag_invalid":
        name = context["discriminator"].strip("'") if context["discriminator"].startswith("'") else "type"
        return f"{name} is {quoted(context['tag'])}; expected one of {context['expected_tags']}"
    return error["msg"].removeprefix("Value error, ")


def _field_path(places: Sequence[int | str]) -> str:
    """Return a path in JavaScript notation: "messages[0].content". Long or unprintable names are quoted."""
    return "".join(map(_step, places)).lstrip(".")[:200]


def _step(part: int | str) -> str:
    if isinstance(part, int):
        return f"[{part}]"
    return f".{part}" if len(part) <= QUOTED_LENGTH and part.isprintable() else f"[{quoted(part)}]"


def _invalid_text(body: object) -> list[int | str] | None:
    """Return the path to a string, or to an object with a key, that is not valid Unicode; None if there is none."""
    pending: list[tuple[list[int | str], object]] = [([], body)]
    while pending:
        path, value = pending.pop()
        if isinstance(value, dict):
            if any(SURROGATE.search(key) for key in value):
                return path
            pending += (([*path, key], inner) for key, inner in value.items())
        elif isinstance(value, list):
            pending += (([*path, index], inner) for index, inner in enumerate(value))
        elif isinstance(value, str) and SURROGATE.search(value):
            return path
    return None


def _path(location: tuple[int | str, ...], body: object) -> list[int | str]:
    """Where in the body it is: pydantic's location without the names of types that it tried."""
    path: list[int | str] = []
    for place, part in enumerate(location):
        if isinstance(part, int) and isinstance(body, list) and part < len(body):
            path.append(part)
            body = body[part]
        elif isinstance(body, dict) and (part in body or place == len(location) - 1):
            path.append(part)
            body = body.get(str(part))
    return path
