"""The application: its routes, what stands before all of them, and how errors leave it."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from torchchat_core import __version__
from torchchat_core.errors import TorchchatError, quoted, quoted_path
from torchchat_core.pipeline import ModelRequest
from torchchat_core.plugins import Registry
from torchchat_core.server import chat, completions, embeddings, responses, texts
from torchchat_core.server.body import Body
from torchchat_core.server.errors import STOPPING, ApiError, ClientGone, malformed, server_ends
from torchchat_core.server.exchange import EventStream, Exchange, Service, json_response
from torchchat_core.server.limits import Limits
from torchchat_core.server.logs import log_failure
from torchchat_core.server.metrics import CONTENT_TYPE, Metrics
from torchchat_core.server.openapi import document
from torchchat_core.server.prompts import LARGE_BODY, check_values
from torchchat_core.server.request_ids import HEADER, SCOPE_KEY, RequestIds
from torchchat_core.server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    ResponsesRequest,
    TokenizeRequest,
)
from torchchat_core.server.shelf import Entry, Shelf

Checked = TypeVar("Checked", bound=Body)
Answer = Callable[[Exchange, Any], Awaitable[Response]]
Handle = Callable[[Request], Awaitable[Response]]
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
DECIDING = (b"authorization", b"content-type", b"content-length", b"transfer-encoding", b"host", b"origin")
OPEN_PATHS = ("/health",)  # that need no API key
BODY_SECONDS = 60.0  # that a client has for sending its request
MOST_DISCARDED = 1 << 28  # bytes of a body that is too large: read to its end, so that its sender hears why
ENDPOINTS: Mapping[str, tuple[type[Body], Answer]] = {
    "/v1/chat/completions": (ChatRequest, chat.answer),
    "/v1/completions": (CompletionRequest, completions.answer),
    "/v1/responses": (ResponsesRequest, responses.answer),
    "/v1/embeddings": (EmbeddingRequest, embeddings.answer),
    "/tokenize": (TokenizeRequest, texts.tokenize),
    "/detokenize": (DetokenizeRequest, texts.detokenize),
}


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What the server is made of."""

    models: Mapping[str, ModelRequest]  # by the names that requests use; the first one is loaded at the start
    limits: Limits
    api_key: str | None = None
    origins: Sequence[str] = ()  # of web pages whose scripts may use the server
    local: bool = False  # listens on this machine alone: pages from elsewhere are kept out


def make_app(options: ServerOptions, registry: Registry) -> Starlette:
    """An ASGI application. The first model is loaded when it starts, the others when they are first asked for.

    Where the first one cannot be loaded, `app.state.failure` is the error, and requests for it get status 503.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        metrics = Metrics()
        shelf = Shelf(options.models, registry, options.limits, metrics)
        app.state.service = Service(shelf, options.limits, metrics, f"torchchat-{__version__}")
        app.state.failure = None
        try:
            try:
                async with shelf.use(next(iter(options.models))):
                    pass
            except ApiError as error:
                cause = error.__cause__
                app.state.failure = cause if isinstance(cause, TorchchatError) else TorchchatError(error.message)
            yield
        finally:
            for threads in (app.state.service.reader, app.state.service.encoder):
                threads.shutdown(wait=False, cancel_futures=True)
            await shelf.close()

    endpoints = {path: _endpoint(kind, answer) for path, (kind, answer) in ENDPOINTS.items()}
    routes = [Route(path, handle, methods=["POST"]) for path, handle in endpoints.items()]
    routes += [
        Route("/health", _health), Route("/metrics", _metrics), Route("/openapi.json", _openapi),
        Route("/v1/models", _models), Route("/v1/models/{name:path}", _model),
    ]
    middleware = [Middleware(Guard, api_key=options.api_key, endpoints=endpoints,
                             paths=[route.path for route in routes],
                             origins=options.origins if options.local else ["*"])]
    if options.origins:
        middleware.insert(0, Middleware(CORSMiddleware, allow_origins=list(options.origins), allow_methods=["*"],
                                        allow_headers=["*"], expose_headers=[HEADER]))
    middleware.insert(0, Middleware(RequestIds))
    return Starlette(routes=routes, lifespan=lifespan, middleware=middleware,
                     exception_handlers={ApiError: _api_error, HTTPException: _http_error})


class Guard:
    """Asks for the API key, counts requests, and turns what nobody expected into a 500 without its details.

    It hands what is posted to an endpoint over to it: all else takes the way of Starlette, whose layers each cost every
    token of a stream some time.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, endpoints: Mapping[str, Handle], paths: Sequence[str],
                 origins: Sequence[str]) -> None:
        """`origins`: of pages that are welcome beside those of this machine; "*": of all."""
        self._app, self._api_key = app, api_key
        self._endpoints = {path: _answered_by(handle) for path, handle in endpoints.items()}
        self._paths = frozenset(paths)
        self._origins = frozenset(origins)
        self._hosts = frozenset(LOCAL_HOSTS) | {_host(origin.partition("://")[2]) for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 499  # a client that left, as others have it

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if fault := ambiguous_head(scope["headers"]):
                error = ApiError(400, fault)
                await json_response(error.body, 400, {"connection": "close"})(scope, receive, noted)
            elif not self._welcomes(scope):
                error = ApiError(403, "this server is for this machine alone: Host has to be localhost, 127.0.0.1 or "
                                      "[::1], and a web page's Origin too; --allow-origin ORIGIN permits another one",
                                 code="origin_refused")
                await json_response(error.body, 403)(scope, receive, noted)
            elif self._permits(scope):
                posted_to = self._endpoints.get(scope["path"]) if scope["method"] == "POST" else None
                await (posted_to or self._app)(scope, receive, noted)
            else:
                error = ApiError(401, "the API key is missing or wrong: Authorization: Bearer KEY",
                                 code="invalid_api_key")
                await json_response(error.body, 401, {"www-authenticate": "Bearer"})(scope, receive, noted)
        except (ClientGone, ClientDisconnect):
            pass
        except asyncio.CancelledError:  # by uvicorn, when the time of grace is over: this task ends here in any case
            if status == 499:
                await json_response(server_ends().body, 503)(scope, receive, noted)
        except BaseException as error:  # panics in Rust libraries are not an `Exception`
            if isinstance(error, STOPPING):
                raise
            log_failure(f"request {scope.get(SCOPE_KEY)} failed", error)
            if status == 499:
                answer = ApiError(500, "the server failed; see its log")
                await json_response(answer.body, 500)(scope, receive, noted)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            scope["app"].state.service.metrics.observe_request(path, status, time.monotonic() - started)

    def _welcomes(self, scope: Scope) -> bool:
        """Whether it comes from this machine: a page can have a name of its own lead here, and forms need no leave."""
        if "*" in self._origins:
            return True
        headers = Request(scope).headers
        origin = headers.get("origin")
        return _host(headers.get("host", "")) in self._hosts and (
            origin is None or origin in self._origins or _host(origin.partition("://")[2]) in LOCAL_HOSTS)

    def _permits(self, scope: Scope) -> bool:
        if self._api_key is None or scope["path"] in OPEN_PATHS:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        return kind.lower() == b"bearer" and secrets.compare_digest(key.strip(), self._api_key.encode())


def ambiguous_head(headers: Sequence[tuple[bytes, bytes]]) -> str | None:
    """Return the fault of headers that different programs may interpret differently; None if there is none."""
    names = [name for name, _ in headers]
    for name in DECIDING:
        if names.count(name) > 1:
            return f"the header {name.decode()} appears more than once; send it once"
    if b"content-length" in names and b"transfer-encoding" in names:
        return "the headers content-length and transfer-encoding exclude each other; send one of them"
    return None


def _answered_by(handle: Handle) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await handle(Request(scope, receive))
        except ApiError as error:
            response = _told(error)
        await response(scope, receive, send)

    return answer


def _host(address: str) -> str:
    """Without the port."""
    return re.sub(r":[0-9]*$", "", address).lower()


def _endpoint(kind: type[Body], answer: Answer) -> Handle:
    async def handle(request: Request) -> Response:
        service: Service = request.app.state.service
        content = await read_body(request, service.limits.max_body_bytes)
        large = len(content) > LARGE_BODY
        if large:  # off the event loop, one at a time
            body = await asyncio.get_running_loop().run_in_executor(service.reader, parsed, kind, content)
        else:
            body = parsed(kind, content)
        del content
        if getattr(body, "stream_options", None) is not None and not getattr(body, "stream", None):
            raise ApiError(400, "stream_options needs stream to be true", "stream_options", "invalid_value")
        model = getattr(body, "model", None)
        exchange = Exchange(service, request, next(iter(service.shelf.entries)) if model is None else model, large)
        await exchange.open()
        streams = False
        try:
            response = await answer(exchange, body)
            streams = isinstance(response, EventStream)
            return response
        finally:
            if not streams:
                exchange.close()

    return handle


async def read_body(request: Request, most: int) -> bytes:
    """The whole body. Raises `ApiError` for one that is too large, too slow, or declared as something else."""
    # Without a type it is refused too: a web page may send that to anyone without asking.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the body is declared as {quoted(kind or 'nothing')}; send it with Content-Type: "
                            "application/json")
    encodings = ",".join(request.headers.getlist("content-encoding"))
    if any(each.strip().lower() not in ("", "identity") for each in encodings.split(",")):
        raise ApiError(415, f"the body is sent with Content-Encoding: {quoted(encodings)}; send it without an "
                            "encoding, and leave the header out")
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= most:
                    parts.append(part)
                elif size > MOST_DISCARDED:
                    break
    except TimeoutError:
        raise ApiError(408, f"the request did not arrive within {BODY_SECONDS:g} seconds") from None
    if size > most:
        raise ApiError(413, f"the body has more than {most} bytes, which are the most that this server takes")
    return b"".join(parts)


def parsed(kind: type[Checked], body: bytes) -> Checked:
    """Raises `ApiError` 400 that names the field which is wrong."""
    check_values(body)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise malformed(error, _content(body)) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None


def _content(body: bytes) -> object:
    """What a body says that was refused, so that an error can name a place in it."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _told(error: ApiError) -> Response:
    headers = {429: {"retry-after": "1"}, 408: {"connection": "close"}}.get(error.status)
    return json_response(error.body, error.status, headers)


async def _api_error(_request: Request, error: Exception) -> Response:
    return _told(cast(ApiError, error))


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    words = {404: f"there is no {quoted_path(request.url.path)}",
             405: f"{quoted_path(request.url.path)} does not take {request.method[:20]}"}
    headers = getattr(error, "headers", None)
    return json_response(ApiError(status, words.get(status, "the request failed")).body, status, headers)


async def _health(_request: Request) -> Response:
    return json_response({"status": "ok"})


async def _metrics(request: Request) -> Response:
    service: Service = request.app.state.service
    engines = [entry.engine for entry in service.shelf.loaded if entry.engine is not None]
    text = service.metrics.text({
        "torchchat_loaded_models": ("models in memory", len(engines)),
        "torchchat_weight_bytes": ("weights of the models in memory", sum(e.bytes for e in service.shelf.loaded)),
        "torchchat_answers_in_progress": ("answers that are made or wait", sum(e.in_progress for e in engines)),
    })
    return Response(text, media_type=CONTENT_TYPE)


async def _models(request: Request) -> Response:
    service: Service = request.app.state.service
    return json_response({"object": "list", "data": [_described(entry) for entry in service.shelf.entries.values()]})


async def _model(request: Request) -> Response:
    service: Service = request.app.state.service
    return json_response(_described(service.shelf.find(request.path_params["name"])))


def _described(entry: Entry) -> dict[str, Any]:
    found = {"id": entry.name, "object": "model", "created": entry.created, "owned_by": "torchchat"}
    if entry.engine is not None:
        found["max_model_len"] = entry.engine.opened.max_seq_length
    return found


async def _openapi(request: Request) -> Response:
    service: Service = request.app.state.service
    return json_response(document({path: kind for path, (kind, _) in ENDPOINTS.items()}, list(service.shelf.entries)))
