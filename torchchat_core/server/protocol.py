"""Extend uvicorn's HTTP/1.1 protocol with time limits for incomplete requests and JSON errors for malformed ones."""

from __future__ import annotations

import asyncio
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

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._stop_timer()
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._rest_is_due() or self.conn.trailing_data[0]:
            self._unset_keepalive_if_required()  # otherwise every further byte would extend the keep-alive timeout
        self._watch()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        """Answer a request that h11 rejects."""
        fault = self.conn.fault
        status = fault.error_status_hint if fault is not None else 400
        self._refuse(ApiError(status, f"the request is not valid HTTP/1.1: {fault or 'it cannot be read'}"))

    def _refuse(self, error: ApiError) -> None:
        """Send an error unless a response was started, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = self.conn.head.headers if self.conn.head is not None else ()
            response = json_response(error.body, error.status, {"connection": "close", HEADER: request_id(headers)})
            self.transport.write(self.conn.send(h11.Response(status_code=error.status, headers=response.raw_headers)))
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


class _Connection(h11.Connection):
    """An h11 connection that keeps the request headers and the fault for the error response."""

    head: h11.Request | None = None
    fault: h11.RemoteProtocolError | None = None

    def next_event(self) -> Any:
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                self.head = event
                if len(event.headers) > MAX_HEADERS:
                    raise h11.RemoteProtocolError(f"it has more than {MAX_HEADERS} headers", error_status_hint=431)
            elif event is h11.NEED_DATA and self.their_state is h11.IDLE:
                self.head = None
            return event
        except h11.RemoteProtocolError as error:
            self.fault = error
            raise
