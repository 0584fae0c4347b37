"""The directory of sessions: opens, resumes, closes, moves and expires them, and announces each change as a message.

A record changes in Redis first and is announced then. Whatever happens in between, the change is announced later: by
the message that asked for it, which is read again, or, for a move, by the next sweep. Nothing here reads messages or
keeps time; `service.py` does.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final, Literal, Protocol

from services.kv_session import metrics
from services.kv_session.fleet import Fleet
from services.kv_session.placement import Place, Placer
from services.kv_session.settings import KvSessionSettings
from shared.errors import (
    BrokerUnavailable,
    ModelNotFound,
    OutriderError,
    Overloaded,
    SessionNotFound,
    StoreUnavailable,
    Unavailable,
)
from shared.protocol import (
    Closed,
    CloseSession,
    Evicted,
    Heartbeat,
    OpenSession,
    Placed,
    PlacementsMessage,
    Refused,
    SessionsMessage,
    TouchSession,
)
from shared.session import SessionState, SessionStatus
from shared.store import StaleState, Store

PlacedReason = Literal["opened", "resumed", "moved"]

# A place may turn up with the next heartbeat.
NOBODY: Final = (Unavailable, Overloaded, ModelNotFound)

logger = logging.getLogger(__name__)


class Publisher(Protocol):
    """What the directory needs of the bus."""

    async def send(self, message: PlacementsMessage, /) -> None:
        """Publish; returns when the broker has it."""


class Directory:
    """Sessions, where they live, and the announcements of both.

    Every step may raise `StoreUnavailable` or `BrokerUnavailable`; taking it again is safe. Several directories may
    work on the same store.
    """

    def __init__(self, settings: KvSessionSettings, store: Store, publisher: Publisher) -> None:
        self.store = store
        self.fleet = Fleet(timeout_s=settings.verifier_timeout_s, now_s=time.monotonic())
        self._publisher = publisher
        self._placer = Placer(
            self.fleet,
            prefix_block=settings.prefix_block,
            affinity_slack=settings.affinity_slack,
            retry_after_s=settings.retry_after_s,
        )
        self._placement_wait_s: Final = settings.placement_wait_s
        self._heard = asyncio.Event()
        self._at_peace: dict[int, str] = {}
        self._astray: set[str] = set()

    # --- what gateways ask ------------------------------------------------------------------------------------

    async def handle(self, message: SessionsMessage, *, request: str) -> None:
        """Do what a gateway asks. `request` is the same whenever the same message is read."""
        match message:
            case OpenSession():
                with metrics.OPEN_SECONDS.time():
                    await self._answer(message, request)
            case CloseSession():
                await self._close(message)
            case TouchSession():
                await self.store.touch(message.session)

    async def refuse(self, message: OpenSession, error: OutriderError) -> None:
        """Tell the gateway that its session is not opened."""
        metrics.REFUSED.labels(error.code).inc()
        await self._publisher.send(
            Refused(
                session=message.session,
                epoch=message.epoch,
                reply=message.reply,
                code=error.code,
                message=error.message,
                retry_after_s=error.retry_after_s,
            )
        )

    async def _answer(self, message: OpenSession, request: str) -> None:
        try:
            if message.resume:
                await self._resume(message, request)
            else:
                await self._open(message)
        except (StoreUnavailable, BrokerUnavailable):
            raise  # no answer: the message is handled again
        except OutriderError as error:
            await self.refuse(message, error)

    async def _open(self, message: OpenSession) -> None:
        known = await self.store.state(message.session)
        if known is None:
            place = await self._find_place(message)
            opened = message.model_copy(update={"model": place.model})
            state = await self.store.create(opened, verifier=place.verifier, partition=place.partition)
            metrics.OPENED.inc()
            metrics.SHARED_TOKENS.inc(place.shared_tokens)
        else:
            state = await self.store.create(message, verifier=known.verifier, partition=known.partition)
        if state.status is SessionStatus.CLOSED:
            await self._announce_closed(state, state.close_reason)
        else:
            await self._announce_placed(state, "opened")

    async def _find_place(self, message: OpenSession) -> Place:
        """A place for a new session.

        While the heartbeats are still being gathered, waits for one that helps; later too, for a moment, when no
        verifier is ready at all (one that restarts is back soon). Too many sessions are refused at once.
        """
        until_s = time.monotonic() + self._placement_wait_s
        while True:
            self._heard.clear()
            try:
                return self._placer.place(
                    message.session, model=message.model, prompt=message.prompt, now_s=time.monotonic()
                )
            except NOBODY as nobody:
                now_s = time.monotonic()
                if self.fleet.settled(now_s) and (not isinstance(nobody, Unavailable) or now_s >= until_s):
                    raise
            await self._next_heartbeat()

    async def _next_heartbeat(self) -> None:
        try:
            async with asyncio.timeout(0.5):
                await self._heard.wait()
        except TimeoutError:
            return

    async def _resume(self, message: OpenSession, request: str) -> None:
        state = await self.store.state(message.session)
        if state is None:
            raise SessionNotFound(f"there is no session {message.session}, or it has expired")
        verifier, partition = await self._place_to_resume(state)
        state = await self.store.place(
            message.session,
            verifier=verifier,
            partition=partition,
            reply=message.reply,
            reopen=True,
            request=request,
        )
        metrics.RESUMED.inc()
        await self._announce_placed(state, "resumed")

    async def _place_to_resume(self, state: SessionState) -> tuple[str, int]:
        """Where a session goes on: where its KV is, else where it was if that has room, else wherever there is room.

        When no verifier is ready it keeps its place: what is committed can be read at once, and the verifier may come
        back.
        """
        here = (state.verifier, state.partition)
        while not self.fleet.alive(time.monotonic()) and not self.fleet.settled(time.monotonic()):
            self._heard.clear()
            await self._next_heartbeat()
        holder = self.fleet.holder(state.partition, time.monotonic())
        if state.ended or (state.owner and self._at_home(state, holder)):
            return here
        try:
            place = self._placer.place(
                state.session,
                model=state.model,
                prompt=await self.store.prompt(state.session),
                now_s=time.monotonic(),
                prefer=state.verifier,
            )
        except Overloaded:
            raise
        except NOBODY:
            return here
        return place.verifier, self._keep_partition(state, place, holder)

    async def _close(self, message: CloseSession) -> None:
        status = SessionStatus.DETACHED if message.detach else SessionStatus.CLOSED
        try:
            state = await self.store.close(
                message.session, status=status, reason=message.reason, epoch=message.epoch
            )
        except (StaleState, SessionNotFound) as error:
            logger.info("close of %s ignored: %s", message.session, error)
            return
        metrics.CLOSED.labels(state.status).inc()
        self.fleet.left(state.verifier, time.monotonic())
        if message.detach:
            await self._announce_evicted(state, message.reason)
        else:
            await self._announce_closed(state, message.reason)

    # --- what the operator asks -------------------------------------------------------------------------------

    async def evict(self, session: str) -> SessionState:
        """Have the session's KV freed; its next block restores it."""
        state = await self._existing(session)
        metrics.EVICTED.inc()
        await self._announce_evicted(state, "operator")
        return state

    async def delete(self, session: str) -> SessionState:
        """End the session and delete its tokens."""
        state = await self.store.close(session, status=SessionStatus.CLOSED, reason="operator")
        await self._announce_closed(state, "operator")
        return await self.store.erase(session)

    async def show(self, session: str) -> SessionState:
        """The session's record."""
        return await self._existing(session)

    async def _existing(self, session: str) -> SessionState:
        state = await self.store.state(session)
        if state is None:
            raise SessionNotFound(f"there is no session {session}, or it has expired")
        return state

    # --- upkeep -----------------------------------------------------------------------------------------------

    def hear(self, heartbeat: Heartbeat) -> None:
        """A verifier has told its load."""
        self.fleet.hear(heartbeat, time.monotonic())
        self._heard.set()

    async def refresh(self) -> None:
        """Learn what other replicas and the operator have decided."""
        self.fleet.drained = await self.store.drained()
        self.fleet.forget(time.monotonic())
        metrics.READY_VERIFIERS.set(len(self.fleet.ready(time.monotonic())))

    async def expire(self) -> int:
        """End the sessions that nobody has used for `session_ttl_s`; how many."""
        expired = await self.store.expire()
        for state in expired:
            await self._announce_closed(state, "expired")
        metrics.EXPIRED.inc(len(expired))
        return len(expired)

    async def finish_moves(self) -> None:
        """Announce the moves that somebody began and didn't live to announce."""
        for session in await self.store.open_moves():
            state = await self.store.state(session)
            if state is not None:
                await self._announce_placed(state, "moved")
            await self.store.end_move(session)

    async def rescue(self, partitions: int, *, thorough: bool) -> None:
        """Move every open session whose verifier is gone or drained, if another takes it.

        Partitions whose verifier is the same as when all was well are passed over, unless `thorough`.
        """
        if not self.fleet.settled(time.monotonic()):
            return
        stranded, astray = 0, set[str]()
        for partition in range(partitions):
            holder = self.fleet.holder(partition, time.monotonic())
            name = holder.verifier if holder and holder.verifier not in self.fleet.drained else ""
            if name and not thorough and self._at_peace.get(partition) == name:
                continue
            lost = [
                state for state in await self.store.sessions_on(partition) if not self._at_home(state, holder)
            ]
            rebalancing = {state.session for state in lost if self._in_rebalance(state)} - self._astray
            astray |= rebalancing
            waiting = [
                state
                for state in lost
                if state.session not in rebalancing and not await self._move(state, holder)
            ]
            stranded += len(waiting)
            self._at_peace[partition] = "" if waiting or rebalancing else name
        self._astray = astray
        metrics.STRANDED.set(stranded)

    def _in_rebalance(self, state: SessionState) -> bool:
        """Whether the session's verifier is there but has lost the partition: perhaps only until it is assigned anew.

        Such a session is moved by the second sweep that finds it so.
        """
        alive = {one.verifier for one in self.fleet.alive(time.monotonic())}
        return state.verifier in alive and state.verifier not in self.fleet.drained

    def _at_home(self, state: SessionState, holder: Heartbeat | None) -> bool:
        """Whether the session's verifier is there: the one it was placed on, restarted perhaps, or its KV's owner."""
        if holder is None or holder.verifier in self.fleet.drained:
            return False
        return holder.verifier == state.verifier or holder.incarnation == state.owner

    async def _move(self, state: SessionState, holder: Heartbeat | None) -> bool:
        """Move a session to another verifier; False when none takes it."""
        now_s = time.monotonic()
        ready = {one.verifier for one in self.fleet.ready(now_s)}
        drained = holder is not None and holder.verifier in self.fleet.drained
        prefer = state.verifier if state.verifier in ready else holder.verifier if holder else ""
        try:
            place = self._placer.place(
                state.session,
                model=state.model,
                prompt=(),
                now_s=now_s,
                prefer=prefer,
                need_room=drained,  # a drained verifier goes on serving; a dead one's sessions can't wait for room
            )
        except OutriderError as error:
            logger.debug("session %s stays on %s: %s", state.session, state.verifier, error)
            return False
        await self.store.begin_move(state.session)
        try:
            moved = await self.store.place(
                state.session,
                verifier=place.verifier,
                partition=self._keep_partition(state, place, holder),
                expected_epoch=state.epoch,
            )
        except (StaleState, SessionNotFound) as error:  # somebody else has acted meanwhile
            logger.info("move of %s dropped: %s", state.session, error)
        else:
            metrics.MOVED.inc()
            logger.info("moved %s from %s to %s", state.session, state.verifier, moved.verifier)
            await self._announce_placed(moved, "moved")
        await self.store.end_move(state.session)
        return True

    @staticmethod
    def _keep_partition(state: SessionState, place: Place, holder: Heartbeat | None) -> int:
        """The session's own partition where the verifier chosen holds it, so that its KV is found again."""
        return state.partition if holder and holder.verifier == place.verifier else place.partition

    # --- announcements ----------------------------------------------------------------------------------------

    async def _announce_placed(self, state: SessionState, reason: PlacedReason) -> None:
        await self._publisher.send(
            Placed(
                session=state.session,
                epoch=state.epoch,
                verifier=state.verifier,
                partition=state.partition,
                base=state.base,
                reply=state.reply,
                reason=reason,
            )
        )

    async def _announce_evicted(self, state: SessionState, reason: str) -> None:
        await self._publisher.send(Evicted(session=state.session, epoch=state.epoch, reason=reason))

    async def _announce_closed(self, state: SessionState, reason: str) -> None:
        await self._publisher.send(Closed(session=state.session, epoch=state.epoch, reason=reason))
