"""Extend uvicorn's HTTP/1.1 protocol with time limits for incomplete requests and JSON errors for malformed ones."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from torchchat_core.server.errors import ApiError
from torchchat_core.server.exchange import json_response
from torchchat_core.server.request_ids import HEADER, request_id

HEAD_SECONDS = 60.0  # time for the headers of a request, counted from the connection or the first byte
REST_SECONDS = 60.0  # time for the rest of a body after an early response
HEAD_BYTES = 16 << 10  # limit on incomplete headers
MAX_HEADERS = 100
VERSIONS = (b"1.0", b"1.1")
ABSOLUTE_FORM = re.compile(rb"(?i:https?)://([^/?#]*)([^#]*)(?:#.*)?")
FAULTS: Mapping[str, str] = {  # by the beginnings of h11's messages, whose ends quote the request
    "illegal request line": "the request line is malformed; expected METHOD PATH HTTP/1.1",
    "no request line": "the request line is missing; expected METHOD PATH HTTP/1.1",
    "illegal header line": "a header line is malformed; expected NAME: VALUE",
    "continuation line": "the first header line begins with white space; expected NAME: VALUE",
    "Missing mandatory Host": "the header host is missing; send it once",
    "Found multiple Host": "the header host appears more than once; send it once",
    "conflicting Content-Length": "the header content-length has several values; send one",
    "bad Content-Length": "the header content-length is malformed; expected a number of bytes",
    "multiple Transfer-Encoding": "the header transfer-encoding appears more than once; send it once",
    "Only Transfer-Encoding": "the header transfer-encoding has an unsupported value; expected chunked",
    "illegal chunk header": "the header of a chunk is malformed; expected its size in hexadecimal digits",
    "malformed chunk footer": "a chunk does not end after its size; expected a line break",
    "Receive buffer too long": f"the request headers have more than {HEAD_BYTES} bytes; send fewer or shorter headers",
}
OTHER_FAULT = "it cannot be read; expected a request line, headers and a body of the declared length"


class Protocol(H11Protocol):
    """uvicorn's protocol with limits. Invalid HTTP gets a JSON error, and the connection is closed."""

    def __init__(self, config: Config, server_state: ServerState, app_state: dict[str, Any],
                 _loop: asyncio.AbstractEventLoop | None = None) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn: _Connection = _Connection(h11.SERVER, HEAD_BYTES)
        self._timer: asyncio.TimerHandle | None = None  # runs while part of a request is still missing

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._rest_is_due() or self.conn.trailing_data[0]:
            self._unset_keepalive_if_required()  # otherwise every further byte would extend the keep-alive timeout
        self._watch()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        """Answer a request that h11 rejects."""
        fault = self.conn.fault
        status = fault.error_status_hint if fault is not None else 400
        self._refuse(ApiError(status, f"the request is not valid HTTP/1.1: {_sentence(fault)}"))

    def _refuse(self, error: ApiError) -> None:
        """Send an error unless a response was started, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = self.conn.head.headers if self.conn.head is not None else ()
            response = json_response(error.body, error.status, {"connection": "close", HEADER: request_id(headers)})
            self.transport.write(self.conn.send(h11.Response(status_code=error.status, headers=response.raw_headers)))
            if self.conn.head is None or self.conn.head.method != b"HEAD":
                self.transport.write(self.conn.send(h11.Data(data=bytes(response.body))))
            self.transport.write(self.conn.send(h11.EndOfMessage()))
        if self.cycle is not None and not self.cycle.response_complete:  # discard the rest of its response
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _watch(self) -> None:
        """Run the timer exactly while part of a request is missing that the application does not wait for."""
        due = self.conn.their_state is h11.IDLE or self._rest_is_due()
        if not due or self.transport.is_closing():
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(REST_SECONDS if self._rest_is_due() else HEAD_SECONDS, self._give_up)

    def _rest_is_due(self) -> bool:
        return self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE

    def _give_up(self) -> None:
        self._timer = None
        if self.conn.trailing_data[0] and not self._rest_is_due():
            self._refuse(ApiError(408, f"the request headers did not arrive within {HEAD_SECONDS:g} seconds"))
        else:  # there is no request to answer
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _UnservedError(h11.RemoteProtocolError):
    """A request that h11 accepts and this server refuses. Its message is written for the client."""


def _sentence(fault: h11.RemoteProtocolError | None) -> str:
    """Return what a client is told about a fault. h11's own messages show Python values and are replaced."""
    text = str(fault)
    if isinstance(fault, _UnservedError):
        return text
    return next((sentence for beginning, sentence in FAULTS.items() if text.startswith(beginning)), OTHER_FAULT)


def _in_origin_form(event: h11.Request) -> h11.Request:
    """Return the request with a path as its target, and as host the one of an absolute target.

    Raises `_UnservedError` for an absolute target without a host, or with a user name.
    """
    found = ABSOLUTE_FORM.fullmatch(event.target)
    if found is None:
        return event
    authority, rest = found.groups()
    if not authority or b"@" in authority:
        raise _UnservedError("the host of the request line is malformed; expected http://HOST:PORT/PATH")
    headers = [(b"host", authority), *(pair for pair in event.headers if pair[0] != b"host")]
    target = rest if rest.startswith(b"/") else b"/" + rest
    return h11.Request(method=event.method, target=target, headers=headers, http_version=event.http_version)


class _Connection(h11.Connection):
    """An h11 connection that keeps the request headers and the fault for the error response."""

    head: h11.Request | None = None
    fault: h11.RemoteProtocolError | None = None

    def next_event(self) -> Any:
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                self.head = event
                if event.http_version not in VERSIONS:
                    raise _UnservedError(f"its version is {event.http_version.decode('ascii')}; expected 1.1 or 1.0",
                                         error_status_hint=505)
                if len(event.headers) > MAX_HEADERS:
                    raise _UnservedError(f"it has more than {MAX_HEADERS} headers", error_status_hint=431)
                event = self.head = _in_origin_form(event)
            elif event is h11.NEED_DATA and self.their_state is h11.IDLE:
                self.head = None
            return event
        except h11.RemoteProtocolError as error:
            self.fault = error
            raise
