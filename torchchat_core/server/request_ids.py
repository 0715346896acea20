"""Give each request an id, and add it to every response as the header x-request-id."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"
NAME = HEADER.encode()
VALID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
SCOPE_KEY = "torchchat.request_id"


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return the client's id if it sent exactly one valid x-request-id, else a new id."""
    given = [value for name, value in headers if name.lower() == NAME]
    if len(given) == 1 and VALID.fullmatch(given[0]):
        return given[0].decode("ascii")
    return f"req_{uuid.uuid4().hex}"


class RequestIds:
    """An ASGI middleware that adds the id of each request to its scope and its response. It is the outermost one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[SCOPE_KEY] = found = request_id(scope["headers"])

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                others = [pair for pair in message.get("headers", ()) if pair[0].lower() != NAME]
                message = {**message, "headers": [*others, (NAME, found.encode("ascii"))]}
            await send(message)

        await self._app(scope, receive, marked)
