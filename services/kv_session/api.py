"""The operator's API: what sessions and verifiers there are, and the means to evict, delete, drain and undrain."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Annotated

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel

from services.kv_session.directory import Directory
from services.kv_session.fleet import Sighting
from shared.errors import OutriderError
from shared.protocol import FinishReason, GenerationParams, ReplyRoute, SessionId
from shared.session import SessionState, SessionStatus

MOST_A_PAGE = 1000


class VerifierNotFound(OutriderError):
    """No such verifier has been heard of (HTTP 404)."""

    code = "verifier_not_found"
    status = 404
    kind = "invalid_request_error"


class SessionView(BaseModel):
    """A session as the operator sees it. Times are milliseconds since the Unix epoch."""

    session: str
    status: SessionStatus
    epoch: int
    base: int
    prompt_length: int
    params: GenerationParams
    model: str
    verifier: str
    partition: int
    owner: str
    reply: ReplyRoute
    finish_reason: FinishReason | None
    close_reason: str
    last_round: int
    rounds: int
    drafted: int
    accepted: int
    created_ms: int
    touched_ms: int
    tenant: str
    metadata: Mapping[str, str]

    @classmethod
    def of(cls, state: SessionState) -> SessionView:
        """The view of a record."""
        own = {name: getattr(state, name) for name in cls.model_fields if hasattr(state, name)}
        stats = state.stats
        return cls(**own, rounds=stats.rounds, drafted=stats.drafted, accepted=stats.accepted)


class SessionList(BaseModel):
    """A page of sessions, newest first; `cursor` asks for the next."""

    sessions: list[SessionView]
    cursor: str | None


class VerifierView(BaseModel):
    """A verifier, as its last heartbeat told `heard_ms_ago`; `takes_sessions` sums the rest up."""

    verifier: str
    incarnation: str
    model: str
    alive: bool
    ready: bool
    drained: bool
    takes_sessions: bool
    partitions: tuple[int, ...]
    sessions: int
    max_sessions: int
    kv_usage: float
    kv_capacity_tokens: int
    max_model_len: int
    step_ms: float
    heard_ms_ago: float


class VerifierList(BaseModel):
    """The verifiers heard of lately, by name."""

    verifiers: list[VerifierView]


Id = Annotated[SessionId, Path(description="The session's id.")]
Name = Annotated[str, Path(description="The verifier's name.", min_length=1, max_length=200)]


def operator_router(directory: Directory, sweep_soon: Callable[[], None]) -> APIRouter:
    """The routes under `/v1`; `sweep_soon` has sessions moved without waiting for the next sweep."""
    router = APIRouter(prefix="/v1", tags=["operator"])

    @router.get("/sessions", summary="List sessions, newest first")
    async def list_sessions(
        status: SessionStatus | None = None,
        verifier: str | None = None,
        cursor: str | None = None,
        limit: Annotated[int, Query(ge=1, le=MOST_A_PAGE)] = 100,
    ) -> SessionList:
        page = await directory.store.sessions(cursor=cursor, limit=limit, status=status, verifier=verifier)
        return SessionList(sessions=[SessionView.of(state) for state in page.sessions], cursor=page.cursor)

    @router.get("/sessions/{session}", summary="Show a session")
    async def show_session(session: Id) -> SessionView:
        return SessionView.of(await directory.show(session))

    @router.post("/sessions/{session}/evict", summary="Free its KV; the next block restores it")
    async def evict_session(session: Id) -> SessionView:
        return SessionView.of(await directory.evict(session))

    @router.delete("/sessions/{session}", summary="End a session and delete its tokens")
    async def delete_session(session: Id) -> SessionView:
        return SessionView.of(await directory.delete(session))

    @router.get("/verifiers", summary="List verifiers")
    async def list_verifiers() -> VerifierList:
        return VerifierList(verifiers=[_view(directory, sighting) for sighting in directory.fleet.known()])

    @router.post("/verifiers/{name}/drain", summary="Place no sessions there, and move its sessions away")
    async def drain_verifier(name: Name) -> VerifierView:
        sighting = _known(directory, name)
        await directory.store.drain(name)
        await directory.refresh()
        sweep_soon()
        return _view(directory, sighting)

    @router.post("/verifiers/{name}/undrain", summary="Place sessions there again")
    async def undrain_verifier(name: Name) -> VerifierView:
        sighting = _known(directory, name)
        await directory.store.undrain(name)
        await directory.refresh()
        return _view(directory, sighting)

    return router


def _known(directory: Directory, name: str) -> Sighting:
    known = {sighting.heartbeat.verifier: sighting for sighting in directory.fleet.known()}
    if name not in known:
        raise VerifierNotFound(
            f"no verifier {name!r} has been heard of; known are: {', '.join(known) or 'none'}"
        )
    return known[name]


def _view(directory: Directory, sighting: Sighting) -> VerifierView:
    heartbeat, fleet, now_s = sighting.heartbeat, directory.fleet, time.monotonic()
    return VerifierView(
        verifier=heartbeat.verifier,
        incarnation=heartbeat.incarnation,
        model=heartbeat.model,
        alive=heartbeat in fleet.alive(now_s),
        ready=heartbeat.ready,
        drained=heartbeat.verifier in fleet.drained,
        takes_sessions=heartbeat in fleet.ready(now_s),
        partitions=heartbeat.partitions,
        sessions=fleet.load(heartbeat.verifier),
        max_sessions=heartbeat.max_sessions,
        kv_usage=heartbeat.kv_usage,
        kv_capacity_tokens=heartbeat.kv_capacity_tokens,
        max_model_len=heartbeat.max_model_len,
        step_ms=heartbeat.step_ms,
        heard_ms_ago=round((now_s - sighting.heard_s) * 1000, 1),
    )
