"""The HTTP interface: OpenAI's endpoints for one model, what operators need, and a page to try it.

A body is read up to a limit before it is parsed, and only as application/json: a page of another site cannot send that
from a browser without asking first, which nothing here answers. Whatever takes long (templates, tokenizing) is done in
threads, so the event loop never waits.
"""

import asyncio
import functools
import pathlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retention_jax.serving import answering, asking, errors, json_text, layouts, protocol
from retention_jax.serving.answering import Answer
from retention_jax.serving.calls import Calls
from retention_jax.serving.engine import Draining, QueueFull
from retention_jax.serving.errors import ApiError
from retention_jax.serving.layouts import Layout
from retention_jax.serving.service import Service

BODY_LIMIT = 2**24  # bytes
BODY_SECONDS = 60.0  # that a body may take to arrive
_PAGE = pathlib.Path(__file__).parent / "page"
_PAGE_FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def make(service: Service) -> ASGIApp:
    """The application."""
    with_service = lambda handler: functools.partial(handler, service)
    complete = lambda layout, kind, plan: functools.partial(_answer, service, layout, kind, plan)
    routes = [
        Route("/v1/chat/completions", complete(layouts.CHAT, protocol.ChatRequest, asking.plan_chat), methods=["POST"]),
        Route(
            "/v1/completions",
            complete(layouts.COMPLETION, protocol.CompletionRequest, asking.plan_completion),
            methods=["POST"],
        ),
        Route("/v1/models", with_service(_models)),
        Route("/v1/models/{model:path}", with_service(_model)),
        Route("/health", with_service(_health)),
        Route("/ready", with_service(_ready)),
        Route("/metrics", with_service(_metrics)),
        *[Route(path, functools.partial(_page, file)) for path, file in _PAGE_FILES.items()],
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            ApiError: errors.on_api_error,
            HTTPException: errors.on_http_error,
            Exception: errors.on_crash,
        },
    )
    app.router.redirect_slashes = False
    return _counted(service, app)


def _counted(service: Service, app: ASGIApp) -> ASGIApp:
    """Counts responses by path and status; a path that is not there counts as `other`."""
    known = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/ready", "/metrics", *_PAGE_FILES}

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in known else "other"
                service.metrics.response(path, message["status"])
            await send(message)

        await app(scope, receive, noted if scope["type"] == "http" else send)

    return counted


async def _models(service: Service, request: Request) -> Response:
    _check_key(service, request)
    return _json({"object": "list", "data": [_described(service)]})


async def _model(service: Service, request: Request) -> Response:
    _check_key(service, request)
    _check_model(service, request.path_params["model"])
    return _json(_described(service))


def _described(service: Service) -> dict[str, Any]:
    model, cache = service.writer.model.config, service.writer.cache
    ours = {
        "row_bytes": service.engine.row_bytes,
        "budget": cache.budget,
        "recent": cache.recent,
        "policy": cache.policy,
        "layers": model.num_layers,
        "heads": model.num_kv_heads,
    }
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "retention_jax",
        "max_model_len": model.context,
        "retention": ours,
    }


async def _health(service: Service, request: Request) -> Response:
    return _json({"status": "ok"})


async def _ready(service: Service, request: Request) -> Response:
    _check_ready(service)
    return _json({"status": "ready"})


async def _metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _page(file: str, request: Request) -> Response:
    content = (_PAGE / file).read_bytes()
    return Response(content, headers=_PAGE_HEADERS, media_type=_TYPES[file.rpartition(".")[2]])


async def _answer(
    service: Service,
    layout: Layout,
    kind: type[Any],
    plan_of: Callable[[Service, Any, float], asking.Plan],
    request: Request,
) -> Response:
    arrived = time.monotonic()
    _check_key(service, request)
    _check_ready(service)
    body = await _body(request)

    def planned() -> asking.Plan:
        asked = protocol.parse(body, kind)
        _check_model(service, asked.model)
        return plan_of(service, asked, arrived)

    plan = await asyncio.to_thread(planned)
    answer, calls = Answer(service, plan, layout, arrived), _submit(service, plan)
    if plan.asked.stream:
        return _Events(answering.in_parts(answer, plan, layout, calls), calls)
    try:
        content = await _unless_gone(request.receive, answering.at_once(answer, plan, layout, calls))
    finally:
        calls.cancel()
    return Response(content, media_type="application/json")


def _submit(service: Service, plan: asking.Plan) -> Calls:
    try:
        return Calls(service.engine, plan.requests)
    except QueueFull as error:
        told = "the queue is full; try again later"
        raise ApiError(429, told, code="queue_full", retry_after=error.retry_after) from None
    except Draining:
        raise errors.unavailable("the server is ending") from None
    except ValueError as error:
        raise errors.bad_request(str(error)) from error


def _check_key(service: Service, request: Request) -> None:
    if service.keys is not None and not service.keys.allow(request.headers.get("authorization")):
        raise ApiError(401, "this server needs an API key: Authorization: Bearer KEY", code="invalid_api_key")


def _check_ready(service: Service) -> None:
    if service.draining.is_set():
        raise errors.unavailable("the server is ending")
    if not service.engine.ready:
        raise errors.unavailable("the server is not ready: it compiles its programs, or its engine has failed")


def _check_model(service: Service, model: str) -> None:
    if model != service.name:
        told = f"there is no model {model!r:.100} here, only {service.name!r}"
        raise ApiError(404, told, param="model", code="model_not_found")


async def _body(request: Request) -> bytes:
    """The body, up to the limit.

    Raises:
      ApiError: 413 above the limit, 415 for another content type, 408 when it does not arrive.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be application/json, and its Content-Type must say so", code="content_type")
    told = request.headers.get("content-length", "")
    if told.isdecimal() and int(told[:20]) > BODY_LIMIT:
        raise _too_large()
    read, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size > BODY_LIMIT:
                    raise _too_large()
                read.append(chunk)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} seconds", code="timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "the connection ended before the body did", code="disconnected") from None
    return b"".join(read)


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {BODY_LIMIT:,} bytes", code="body_too_large")


async def _unless_gone(receive: Receive, work: Awaitable[bytes]) -> bytes:
    """Waits for the work, and gives it up when the client goes."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else b""  # which nobody reads
    finally:
        task.cancel()
        gone.cancel()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Events(Response):
    """Server-sent events. When the client goes, or reads no more and goes, the requests behind them end."""

    def __init__(self, events: AsyncIterator[bytes], calls: Calls) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._events, self._calls = events, calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write() -> bytes:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return b""

        try:
            await _unless_gone(receive, write())
        finally:
            self._calls.cancel()


def _json(value: Any) -> Response:
    return Response(json_text.dump(value), media_type="application/json")
