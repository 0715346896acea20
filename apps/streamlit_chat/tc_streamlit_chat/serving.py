"""The pages as an ASGI application, run by core's own server."""

from __future__ import annotations

import re
import secrets
import socket
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from torchchat_core.server.running import run

COOKIE = "torchchat_browser"  # tells browsers apart where others than this machine's user can come
COOKIE_FORM = re.compile(r"[\w-]{32,64}", re.ASCII)
HOST = re.compile(r"[\w.\-]+(:[0-9]+)?|\[[0-9a-f:.]+\](:[0-9]+)?", re.ASCII | re.IGNORECASE)
YEAR = 365 * 86400  # seconds
PAGE = Path(__file__).resolve().parent / "pages" / "app.py"
GRACE = 1.0  # seconds that connections get at the end
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
# What a model writes can name pictures: a page that showed those of others would tell them so, and all that stands in
# their address.
POLICY = ("img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src {sockets}; "
          "frame-src 'self' data: blob:; object-src 'none'; form-action 'self'; base-uri 'self'; "
          "frame-ancestors 'self'")

STREAMLIT: dict[str, Any] = {
    "server.headless": True,  # no question for an e-mail address, no browser that opens by itself
    "server.showEmailPrompt": False,
    "browser.gatherUsageStats": False,
    "server.enableCORS": True,
    "server.enableXsrfProtection": True,
    "server.enableStaticServing": False,
    "server.enableAgentApi": False,
    "server.fileWatcherType": "none",
    "server.runOnSave": False,
    "server.maxUploadSize": 1,  # MB; nothing is uploaded
    "client.toolbarMode": "minimal",
    "client.showErrorDetails": "none",
    "client.showErrorLinks": False,
    "runner.magicEnabled": False,
    "runner.postScriptGC": False,  # looks at every object of PyTorch five times a second, while the model waits
    "global.developmentMode": False,
    "logger.hideWelcomeMessage": True,
    "logger.level": "error",
    "theme.light.primaryColor": "#1f6fd0",
    "theme.light.backgroundColor": "#ffffff",
    "theme.light.secondaryBackgroundColor": "#f3f5f8",
    "theme.light.textColor": "#20242b",
    "theme.light.borderColor": "#dfe3e8",
    "theme.dark.primaryColor": "#6aabff",
    "theme.dark.backgroundColor": "#14171b",
    "theme.dark.secondaryBackgroundColor": "#1d2228",
    "theme.dark.textColor": "#e6e9ee",
    "theme.dark.borderColor": "#343b45",
}


def make_app(private: bool, hosts: tuple[str, ...] = ()) -> Starlette:
    """The application. `private`: it is reached from this machine alone, and other names for it are refused; else
    `hosts` may be reached, all where there are none."""
    from streamlit import App, config

    names = LOCAL_NAMES if private else hosts
    for name, value in STREAMLIT.items():
        config.set_option(name, value)
    config.set_option("server.allowedHosts", [name.strip("[]") for name in names])
    pages = App(PAGE)
    app = Starlette(routes=[Mount("/", pages)], lifespan=pages.lifespan(),
                    middleware=[Middleware(Guard, names=names, private=private)])
    app.state.failure = None
    return app


def serve(app: Starlette, host: str, listener: socket.socket, announce: Callable[[str], None]) -> int:
    """Serves until a signal; the exit status. `announce` gets the address once pages can be had."""
    return run(app, host, listener.getsockname()[1], GRACE, announce, listener, websockets=True)


class Guard:
    """Stands before all pages: keeps other machines' pages out, says what a page may load, and tells browsers apart.

    A page elsewhere can have a name of its own lead here, and then reads what it likes; so names count. Streamlit's own
    look at origins comes on top of it.
    """

    def __init__(self, app: ASGIApp, names: tuple[str, ...], private: bool) -> None:
        """`names`: hosts that may be asked for; none: all."""
        self._app, self._names, self._private = app, frozenset(names), private

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        if not self._welcomes(connection):
            await _refuse(scope, receive, send)
            return
        fresh = None if self._private or owner_of(connection.headers.get("cookie", "")) else secrets.token_urlsafe(24)

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = policy(connection.headers.get("host", ""))
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                if fresh is not None and headers.get("content-type", "").startswith("text/html"):
                    headers.append("Set-Cookie", f"{COOKIE}={fresh}; Path=/; Max-Age={YEAR}; HttpOnly; SameSite=Strict")
            await send(message)

        await self._app(scope, receive, sent)

    def _welcomes(self, connection: HTTPConnection) -> bool:
        """Whether the host is one of ours, and a page that asks is of that same host."""
        host = connection.headers.get("host", "").lower()
        origin = connection.headers.get("origin")
        if self._names and _without_port(host) not in self._names:
            return False
        return origin is None or origin.partition("://")[2].lower() == host


def policy(host: str) -> str:
    """What a page of that host may load, and from where."""
    sockets = f"'self' ws://{host} wss://{host}" if HOST.fullmatch(host) else "'self'"
    return POLICY.format(sockets=sockets)


def owner_of(cookies: str) -> str | None:
    """Which browser it is, from a Cookie header; None where it has not been told yet."""
    try:
        found = SimpleCookie(cookies).get(COOKIE)
    except CookieError:
        return None
    return found.value if found is not None and COOKIE_FORM.fullmatch(found.value) else None


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await PlainTextResponse("This page is for this machine alone: use http://127.0.0.1 or http://localhost.\n",
                            status_code=403)(scope, receive, send)


def _without_port(address: str) -> str:
    return re.sub(r":[0-9]*$", "", address)
