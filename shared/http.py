"""What every service's HTTP side has in common: error bodies, `/healthz`, `/readyz`, `/metrics`, and the server itself.

Every error leaves as an OpenAI-style body (`OutriderError.as_openai`), never as a traceback. Which routes a service has
beyond these is its own matter.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from inspect import isawaitable
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import uvicorn
import uvloop
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from pydantic_settings import BaseSettings
from starlette.exceptions import HTTPException

from shared.errors import InvalidRequest, OutriderError
from shared.heap import leave_alone
from shared.protocol import SCHEMA_VERSION
from shared.telemetry import METRICS_CONTENT_TYPE, render_metrics

Settings = TypeVar("Settings", bound=BaseSettings)
Service = TypeVar("Service")

GRACE_S: Final = 10.0
START_S: Final = 10.0
READY_LOOK_S: Final = 0.1
LONGEST_MESSAGE: Final = 4 << 20
"""Bytes of a WebSocket's message; a longer one ends the connection."""

logger = logging.getLogger(__name__)


class NotFound(OutriderError):
    """No such path (HTTP 404)."""

    code = "not_found"
    status = 404
    kind = "invalid_request_error"


class MethodNotAllowed(OutriderError):
    """The path has no such method (HTTP 405)."""

    code = "method_not_allowed"
    status = 405
    kind = "invalid_request_error"


class AddressTaken(OutriderError):
    """The service's own address can't be listened on."""

    code = "address_taken"


# --- errors -------------------------------------------------------------------------------------------------------


def error_response(error: OutriderError) -> JSONResponse:
    """The response that `error` becomes; `Retry-After` in whole seconds where it says when to try again."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    return JSONResponse(error.as_openai(), status_code=error.status, headers=headers)


def install_error_handlers(app: FastAPI) -> None:
    """Let every error of the app leave as an OpenAI-style body."""

    @app.exception_handler(OutriderError)
    async def _ours(request: Request, error: OutriderError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        return error_response(invalid_request(error.errors()))

    @app.exception_handler(HTTPException)
    async def _refused(request: Request, error: HTTPException) -> Response:
        return error_response(_routing_error(request, error))

    @app.exception_handler(Exception)
    async def _unforeseen(request: Request, error: Exception) -> Response:
        # Starlette logs the traceback once this handler has answered.
        return error_response(OutriderError("the server failed on this request; its log says why"))


def invalid_request(faults: Sequence[Any]) -> InvalidRequest:
    """The error for pydantic's list of faults: the first in full, and how many there are."""
    first = faults[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return InvalidRequest(f"the request body is not JSON: {reason}")
    param = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path", "header"))
    more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
    where = f"{param}: " if param else ""
    return InvalidRequest(f"{where}{first['msg']}{more}", param=param or None)


def _routing_error(request: Request, error: HTTPException) -> OutriderError:
    match error.status_code:
        case HTTPStatus.NOT_FOUND:
            return NotFound(f"there is no {request.url.path} here")
        case HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = (error.headers or {}).get("Allow", "another method")
            return MethodNotAllowed(f"{request.url.path} is not for {request.method}; use {allowed}")
        case status if status < HTTPStatus.INTERNAL_SERVER_ERROR:
            return InvalidRequest(str(error.detail))
        case _:
            return OutriderError(str(error.detail))


# --- health, readiness, metrics -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Readiness:
    """What a service lacks before it can serve (`missing`; empty: it is ready), and what its operator should know."""

    missing: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def ready(self) -> bool:
        """Nothing is missing."""
        return not self.missing


ReadinessCheck = Callable[[], Readiness | Awaitable[Readiness]]


def create_app(
    title: str,
    readiness: ReadinessCheck,
    *,
    description: str = "",
    healthy: Callable[[], bool] = lambda: True,
) -> FastAPI:
    """An app with OpenAPI docs at `/docs`, error bodies and the operations routes; the service adds its own."""
    app = FastAPI(title=title, description=description, version=SCHEMA_VERSION)
    install_error_handlers(app)
    app.include_router(operations_router(readiness, healthy))
    app.state.readiness = readiness
    return app


async def _asked(readiness: ReadinessCheck) -> Readiness:
    answer = readiness()
    return await answer if isawaitable(answer) else answer


def operations_router(readiness: ReadinessCheck, healthy: Callable[[], bool] = lambda: True) -> APIRouter:
    """`/healthz` (200 while `healthy`), `/readyz` (503 with its reasons until ready) and `/metrics`."""
    router = APIRouter(tags=["operations"])

    @router.get("/healthz", summary="Whether the process is alive")
    async def healthz() -> JSONResponse:
        if healthy():
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "failed"}, status_code=HTTPStatus.SERVICE_UNAVAILABLE)

    @router.get("/readyz", summary="Whether it can serve, and why not")
    async def readyz() -> JSONResponse:
        state = await _asked(readiness)
        body = {"ready": state.ready, "reasons": list(state.missing), "notes": list(state.notes)}
        status = HTTPStatus.OK if state.ready else HTTPStatus.SERVICE_UNAVAILABLE
        return JSONResponse(body, status_code=status)

    @router.get("/metrics", summary="Metrics in Prometheus' text format", response_class=Response)
    async def metrics() -> Response:
        return Response(render_metrics(), media_type=METRICS_CONTENT_TYPE)

    return router


# --- the server ---------------------------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: the service decides the order in which it stops."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """Serves `app` between entering and leaving; leaving lets open requests end, for `grace_s` at most.

    Raises `AddressTaken` when it can't listen. `port` is the one listened on, also where 0 was asked for.
    """

    def __init__(self, app: FastAPI, *, host: str, port: int, grace_s: float = GRACE_S) -> None:
        self._address = (host, port)
        config = uvicorn.Config(
            app,
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level=logging.WARNING,
            server_header=False,
            ws_max_size=LONGEST_MESSAGE,
            ws_per_message_deflate=False,
            ws_ping_interval=None,  # who serves WebSockets pings as it needs
            timeout_graceful_shutdown=math.ceil(grace_s),
        )
        self._server = _Server(config)
        self._socket: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def port(self) -> int:
        """The port listened on."""
        return int(self._socket.getsockname()[1]) if self._socket else self._address[1]

    async def start(self) -> None:
        """Listen, and answer from now on."""
        self._socket = _listen(*self._address)
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="http")
        async with asyncio.timeout(START_S):
            while not (self._server.started or self._task.done()):  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(0.01)
        logger.info("listening on http://%s:%d", self._address[0], self.port)

    async def stop(self) -> None:
        """Take no more requests, let the open ones end."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task
            self._task = None


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=2048)
        # Inherited by every connection. asyncio sets it itself, but not on sockets that don't name their protocol, as
        # those of create_server: small writes would wait up to 40 ms for the acknowledgement of the one before.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except (OSError, OverflowError) as error:
        number = error.errno if isinstance(error, OSError) else None
        reason = os.strerror(number) if number and number > 0 else error
        raise AddressTaken(
            f"can't listen on {host}:{port}: {reason}; give another host or port, or stop what listens there"
        ) from None


@asynccontextmanager
async def stop_signals() -> AsyncIterator[asyncio.Event]:
    """An event that SIGTERM or SIGINT sets, so that a service can stop in its own order."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def run_loop(main: Coroutine[Any, Any, int]) -> int:
    """Run a process' `main` on uvloop; the exit status.

    A round passes through some ten callbacks a process: on asyncio's own loop they cost it 1 ms more, of 5.
    """
    return uvloop.run(main)


async def run_service(
    serve: Callable[[asyncio.Event], Awaitable[None]], app: FastAPI, *, host: str, port: int
) -> int:
    """Run `serve` beside its HTTP side until a signal sets its event; the process' exit status.

    HTTP answers first and last, so that `/readyz` tells how starting and stopping go. An `OutriderError` ends the
    service with its message, as one line of the log and without a traceback.
    """
    try:
        async with stop_signals() as stop, HttpServer(app, host=host, port=port), _settling(app):
            await serve(stop)
    except OutriderError as error:
        logger.critical("%s", error.message)
        return 1
    return 0


@asynccontextmanager
async def _settling(app: FastAPI) -> AsyncIterator[None]:
    """Once the service is ready, have the garbage collector leave alone what is there (`leave_alone`)."""

    async def settle() -> None:
        while not (await _asked(app.state.readiness)).ready:  # noqa: ASYNC110 - others ask for it as well
            await asyncio.sleep(READY_LOOK_S)
        logger.debug("%d objects are left alone by the garbage collector", leave_alone())

    settling = asyncio.create_task(settle(), name="settling")
    try:
        yield
    finally:
        settling.cancel()
        await asyncio.gather(settling, return_exceptions=True)


def load_settings(kind: type[Settings]) -> Settings:
    """The service's settings from the environment; ends the process with one line a fault when they are not right."""
    try:
        return kind()
    except ValidationError as error:
        prefix = str(kind.model_config.get("env_prefix", ""))
        for fault in error.errors(include_url=False, include_context=False):
            name = prefix + "_".join(str(part) for part in fault["loc"]).upper()
            reason = fault["msg"].removeprefix("Value error, ")
            print(f"{name}={fault['input']!r}: {reason}", file=sys.stderr)
        raise SystemExit(2) from None


def build_service(make: Callable[[], Service]) -> Service:
    """The service that `make` gives; ends the process with one line of the log when what it needs isn't there."""
    try:
        return make()
    except OutriderError as error:
        logger.critical("%s", error.message)
        raise SystemExit(1) from None
