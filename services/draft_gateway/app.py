"""The gateway's HTTP face: OpenAI's endpoints and the streams that survive their connection.

Routes read a body within limits, hand it to `Sessions`, and answer in one piece or as events. What a body may say is in
`openai_api.py`; errors become bodies in `shared/http.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Final, TypeVar

from fastapi import APIRouter, FastAPI, Request, WebSocket
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, TypeAdapter, ValidationError

from services.draft_gateway.link.server import LinkServer
from services.draft_gateway.openai_api import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    JsonObject,
    RequestTooLarge,
    check_model,
    model_card,
    model_list,
    parse_chat,
    parse_completion,
)
from services.draft_gateway.sessions import Sessions
from services.draft_gateway.settings import GatewaySettings
from services.draft_gateway.streams import (
    EventStreamResponse,
    EventWriter,
    Position,
    events,
    everything,
    seed_of,
    whole,
)
from shared.errors import InvalidRequest, OutriderError, SessionNotFound
from shared.http import ReadinessCheck
from shared.http import create_app as create_service_app
from shared.protocol import SessionId
from shared.telemetry import TRACEPARENT, TraceContext

Answer = TypeVar("Answer")

LONGEST_KEY: Final = 255

_SESSION_ID: Final[TypeAdapter[str]] = TypeAdapter(SessionId)


class ClientGone(OutriderError):
    """The client left before its answer; nobody reads this."""

    code = "client_gone"
    status = 499


def create_app(
    settings: GatewaySettings,
    sessions: Sessions,
    readiness: ReadinessCheck,
    *,
    links: LinkServer | None = None,
) -> FastAPI:
    """The app over `sessions`, in the cloud over `links` too; it starts and stops nothing itself."""
    app = create_service_app(
        "Outrider draft-gateway",
        readiness,
        description="OpenAI-compatible, decoded speculatively: exact, replayable, resumable.",
    )
    app.include_router(_generating(settings, sessions))
    app.include_router(_models(settings))
    app.include_router(_streams(settings, sessions))
    if links is not None:
        app.include_router(_link(links))
    return app


# --- generating -------------------------------------------------------------------------------------------------


def _generating(settings: GatewaySettings, sessions: Sessions) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["openai"])

    @router.post(
        "/chat/completions", summary="Answer a chat", openapi_extra=_json_body(ChatCompletionRequest)
    )
    async def chat_completions(request: Request) -> Response:
        return await _generate(parse_chat(await _body(request, settings.max_request_bytes)), request)

    @router.post("/completions", summary="Continue a text", openapi_extra=_json_body(CompletionRequest))
    async def completions(request: Request) -> Response:
        return await _generate(parse_completion(await _body(request, settings.max_request_bytes)), request)

    async def _generate(asked: GenerationRequest, request: Request) -> Response:
        key = _idempotency_key(request)
        opening = sessions.open(asked, trace=_trace(request), idempotency_key=key)
        readings = await _while_connected(request, opening)
        if asked.stream:
            return await _stream(settings, request, [EventWriter(reading) for reading in readings])
        try:
            body = await _while_connected(request, whole(readings))
        finally:
            for reading in readings:
                reading.stream.leave("the client has left", detach=key is not None)
        return JSONResponse(body)

    return router


async def _stream(settings: GatewaySettings, request: Request, writers: Sequence[EventWriter]) -> Response:
    """The events of all choices. What fails before the first token still becomes a status of its own."""

    def leave() -> None:
        for writer in writers:
            writer.reading.stream.leave("the client has left", detach=True)

    try:
        await _while_connected(request, writers[0].reading.stream.started(settings.keepalive_s))
    except BaseException:
        leave()
        raise
    return EventStreamResponse(
        events(writers, keepalive_s=settings.keepalive_s),
        on_end=leave,
        patience_s=settings.stall_timeout_s,
        headers={"x-outrider-session": writers[0].reading.form.session},
    )


async def _while_connected(request: Request, work: Coroutine[object, object, Answer]) -> Answer:
    """The result of `work`, which is cancelled when the client leaves. The request's body has to be read already."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone("the client has left")
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def _body(request: Request, limit: int) -> bytes:
    """The request's body; RequestTooLarge beyond `limit` bytes, without reading on."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body is longer than {limit} bytes, the most that is read")


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= LONGEST_KEY:
        raise InvalidRequest(
            f"an Idempotency-Key has 1 to {LONGEST_KEY} characters, not {len(key)}", param="Idempotency-Key"
        )
    return key


def _trace(request: Request) -> TraceContext:
    trace = TraceContext.from_header(request.headers.get(TRACEPARENT))
    return TraceContext.new() if trace is None else trace.child()


def _json_body(model: type[BaseModel]) -> JsonObject:
    """The OpenAPI text of a body that `openai_api` reads instead of FastAPI, references resolved."""
    schema = model.model_json_schema()
    resolved = _resolved(schema, schema.pop("$defs", {}))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": resolved}}}}


def _resolved(schema: object, definitions: Mapping[str, object]) -> object:
    if isinstance(schema, list):
        return [_resolved(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if isinstance(reference := schema.get("$ref"), str):
        return _resolved(definitions[reference.rpartition("/")[2]], definitions)
    return {name: _resolved(part, definitions) for name, part in schema.items()}


# --- models -----------------------------------------------------------------------------------------------------


def _models(settings: GatewaySettings) -> APIRouter:
    router = APIRouter(prefix="/v1/models", tags=["openai"])
    card = model_card(settings.served_name, created=int(time.time()), max_model_len=settings.max_model_len)

    @router.get("", summary="The models that are served")
    async def models() -> JSONResponse:
        return JSONResponse(model_list([card]))

    @router.get("/{model:path}", summary="One model")
    async def model(model: str) -> JSONResponse:
        check_model(model, settings.served_name)
        return JSONResponse(card)

    return router


# --- streams ----------------------------------------------------------------------------------------------------


def _streams(settings: GatewaySettings, sessions: Sessions) -> APIRouter:
    router = APIRouter(prefix="/v1/streams", tags=["streams"])

    @router.get("/{session}", summary="Read a stream on after Last-Event-ID, or from its start")
    async def resume(session: str, request: Request, last_event_id: str | None = None) -> Response:
        _check_session(session)
        after = request.headers.get("last-event-id", last_event_id)
        start = Position.parse(after, session=session) if after else None
        resuming = sessions.resume(session, start, trace=_trace(request))
        return await _stream(
            settings, request, [EventWriter(await _while_connected(request, resuming), start)]
        )

    @router.post("/{session}/replay", summary="Generate an answer again, to compare the two")
    async def replay(session: str, request: Request) -> JSONResponse:
        _check_session(session)
        await _body(request, settings.max_request_bytes)
        replaying = await _while_connected(request, sessions.replay(session, trace=_trace(request)))
        try:
            text, again = await _while_connected(request, everything(replaying.again))
        finally:
            replaying.again.stream.leave("the client has left", detach=False)
        return JSONResponse(
            {
                "id": session,
                "object": "replay",
                "equal": again == replaying.tokens,
                "seed": seed_of(replaying.state.params),
                "temperature": replaying.state.params.sampling.temperature,
                "text": text,
                "token_ids": replaying.tokens,
                "replayed_token_ids": again,
            }
        )

    @router.delete("/{session}", summary="End a session for good")
    async def cancel(session: str) -> JSONResponse:
        _check_session(session)
        await sessions.cancel(session)
        return JSONResponse({"id": session, "object": "stream.deleted", "deleted": True})

    return router


# --- links ------------------------------------------------------------------------------------------------------


def _link(links: LinkServer) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.websocket("/link")
    async def link(websocket: WebSocket) -> None:
        await links.serve(websocket)

    return router


def _check_session(session: str) -> None:
    try:
        _SESSION_ID.validate_python(session)
    except ValidationError:
        raise SessionNotFound(
            f"there is no session {session[:120]!r}; ids look like chatcmpl-… or cmpl-…"
        ) from None
