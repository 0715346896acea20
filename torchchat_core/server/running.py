"""Running the application with uvicorn, until it is told to stop."""

from __future__ import annotations

import errno
import math
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from torchchat_core.errors import TorchchatError
from torchchat_core.server.logs import own_messages
from torchchat_core.server.protocol import Protocol


class Server(uvicorn.Server):
    """Ends gracefully at SIGTERM and Ctrl-C, at once at the second one; the exit status is 0 then."""

    def __init__(self, config: uvicorn.Config, app: Starlette, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._app, self._announce = app, announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._app.state.failure is None:
            self._announce()
        else:
            self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True


def run(app: Starlette, host: str, port: int, grace: float, announce: Callable[[str], None],
        listener: socket.socket | None = None, websockets: bool = False) -> int:
    """Serve until a signal arrives, and return the exit status.

    `announce` is called with the address once the first model is loaded. `listener` is an open socket from `listen`.
    With `websockets`, the application accepts WebSocket connections. Raises `TorchchatError` if the address cannot be
    used or the first model cannot be loaded.
    """
    listener = listener or listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}"
    with own_messages():
        make_server(app, grace, lambda: announce(address), websockets).run(sockets=[listener])
    failure: TorchchatError | None = app.state.failure
    if failure is not None:
        raise failure
    return 0


def make_server(app: Starlette, grace: float, announce: Callable[[], None], websockets: bool = False) -> Server:
    """Return a server to run. `announce` is called when it accepts requests.

    Without `websockets`, upgrades are ignored: such a request is answered over HTTP/1.1.
    """
    # uvicorn would prefer its other HTTP parsers if they are installed, but those do not limit headers.
    config = uvicorn.Config(app, http=Protocol, ws="auto" if websockets else "none", log_config=None,
                            log_level="warning", access_log=False, lifespan="on", server_header=False,
                            timeout_graceful_shutdown=math.ceil(grace))
    return Server(config, app, announce)


def listen(host: str, port: int) -> socket.socket:
    """A socket at that address; 0 is any port that is free. Raises `TorchchatError` where it cannot be used."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason, _, _ = (error.strerror or str(error)).partition(" (while attempting")
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            fix = "choose another --port, or end what is using it"
        else:
            fix = "name an address of this machine with --host, such as 127.0.0.1"
        raise TorchchatError(f"cannot listen at {host}:{port}: {reason}", fix) from None
