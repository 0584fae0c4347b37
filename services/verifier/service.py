"""The verifier as a process: reads drafts and placements, keeps a shell a session, reports load, gives way to SIGTERM.

Thin: what happens to a session is decided in `shared/speculation/verifier.py` and carried out in `session_shell.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Coroutine, Iterable
from weakref import WeakValueDictionary

from fastapi import FastAPI

from services.verifier import metrics
from services.verifier.engine.types import Engine, EngineInfo, EngineStats, ExitReport
from services.verifier.session_shell import Chain, Passes, SessionShell
from services.verifier.settings import VerifierSettings
from shared.bus import Bus, Reader, Received
from shared.errors import EngineError, OutriderError
from shared.http import Readiness, create_app
from shared.protocol import (
    Block,
    Cancel,
    Closed,
    DraftsMessage,
    Evicted,
    Fault,
    Forward,
    Heartbeat,
    Placed,
    PlacementsMessage,
    Topic,
)
from shared.speculation import verifier as core
from shared.store import Store

log = logging.getLogger(__name__)

GROUP = "outrider-verifiers"
STOP_DEADLINE_S = 5.0
PLACE_DEADLINE_S = 5.0


class VerifierService:
    """One verifier process around one engine."""

    def __init__(self, settings: VerifierSettings, engine: Engine) -> None:
        self.settings = settings
        self.engine = engine
        self.incarnation = f"{settings.verifier_name}/{secrets.token_hex(4)}"
        self.store = Store(settings)
        self.bus = Bus(settings, client=settings.verifier_name)
        self.app: FastAPI = create_app("Outrider verifier", self.readiness)
        self._info: EngineInfo | None = None
        self._shells: dict[str, SessionShell] = {}
        self._holding: set[SessionShell] = set()
        self._forgotten = asyncio.Event()
        self._chains: WeakValueDictionary[str, Chain] = WeakValueDictionary()
        self._background: set[asyncio.Task[None]] = set()
        self._drafts: Reader[DraftsMessage] | None = None
        self._partitions: tuple[int, ...] = ()
        self._stopping = False
        self.passes = Passes()
        self._asked: asyncio.Task[EngineStats] | None = None
        self._stats: EngineStats | None = None
        self._beat = asyncio.Event()

    async def readiness(self) -> Readiness:
        """Ready when the engine is up and Kafka has given this verifier partitions of the drafts topic."""
        missing: list[str] = []
        if self._info is None:
            missing.append("the engine is starting")
        elif not self.engine.healthy():
            missing.append("the engine has died")
        if not self._partitions:
            missing.append("no partition of the drafts topic is assigned yet")
        if self._stopping:
            missing.append("stopping")
        notes = list(self._info.notes) if self._info else []
        return Readiness(missing=missing, notes=notes)

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set. Raises `OutriderError` when something it cannot do without is missing or dies."""
        async with self.store, self.bus:
            await self.bus.ensure_topics()
            self._info = await self.engine.start(self._exit_seen)
            self.passes.padded = self._info.padded
            for note in self._info.notes:
                log.warning("%s", note)
            log.info(
                "engine ready: %s, %d layers, exits after %s (%s), %s, %.2f of its bytes read by a pass of few rows",
                self._info.model_name,
                self._info.num_layers,
                ", ".join(map(str, self._info.exit_layers)) or "none",
                self._info.exits,
                self._info.dtype,
                self._info.compact,
            )
            try:
                await self._serve(stop)
            finally:
                await self._wind_up()
                await self.engine.stop()

    async def _serve(self, stop: asyncio.Event) -> None:
        drafts: Reader[DraftsMessage] = self.bus.group_reader(
            Topic.DRAFTS,
            group=GROUP,
            member=self.settings.verifier_name,
            session_timeout_s=self.settings.member_timeout_s,
            on_assigned=self._assigned,
            on_revoked=self._revoked,
        )
        placements: Reader[PlacementsMessage] = self.bus.reader(Topic.PLACEMENTS)
        async with drafts, placements:
            self._drafts = drafts
            work = [
                asyncio.create_task(self._read_drafts(drafts)),
                asyncio.create_task(self._read_placements(placements)),
                asyncio.create_task(self._heartbeats()),
                asyncio.create_task(self._sweep()),
                asyncio.create_task(stop.wait()),
            ]
            try:
                finished, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
                for task in finished:
                    task.result()
            finally:
                for task in work:
                    task.cancel()
                await asyncio.gather(*work, return_exceptions=True)
                await self._finish_open_rounds()

    # --- reading --------------------------------------------------------------------------------------

    async def _read_drafts(self, drafts: Reader[DraftsMessage]) -> None:
        async for received in drafts:
            self._dispatch(received)

    def _dispatch(self, received: Received[DraftsMessage]) -> None:
        message = received.message
        shell = self._shells.get(message.session)
        if shell is None:
            if isinstance(
                message, Cancel | Forward
            ):  # nothing is held here: nothing to free, nothing to follow
                self.done(received)
                return
            chain = self._chains.get(message.session) or Chain()
            self._chains[message.session] = chain
            shell = SessionShell(
                message.session,
                self,
                max_block=self.settings.max_block,
                chain=chain,
                floor_drafts=self.settings.floor_drafts,
                own_drafts=self._info is not None and self._info.own_drafts,
            )
            self._shells[message.session] = shell
        if shell.unanswered >= self.settings.session_queue and not isinstance(message, Cancel):
            self._refuse(received)
            return
        shell.receive(received)

    def _refuse(self, received: Received[DraftsMessage]) -> None:
        message = received.message
        if isinstance(message, Forward):
            self.done(received)
            return
        assert not isinstance(message, Cancel)
        fault = Fault(
            session=message.session,
            epoch=message.epoch,
            round=message.round if isinstance(message, Block) else 0,
            code="overloaded",
            message=f"{self.settings.session_queue} messages of this session wait already",
            retry_after_s=1.0,
        )
        self.background(self._send_fault(fault, message.reply.partition, received))

    async def _send_fault(self, fault: Fault, partition: int, received: Received[DraftsMessage]) -> None:
        try:
            await self.bus.send(fault, partition=partition)
        except OutriderError as error:
            log.warning("could not publish a fault for %s: %s", fault.session, error)
        self.done(received)

    async def _read_placements(self, placements: Reader[PlacementsMessage]) -> None:
        async for received in placements:
            message = received.message
            shell = self._shells.get(message.session)
            if shell is None or message.epoch < shell.epoch:
                continue
            match message:
                case Evicted(reason=reason):
                    self._evict(shell, reason)
                case Closed(reason=reason):
                    shell.handle(
                        core.Received(Cancel(session=message.session, epoch=message.epoch, reason=reason))
                    )
                case Placed(partition=partition) if partition not in self._partitions:
                    self._evict(shell, "moved")
                case _:
                    pass

    # --- partitions -----------------------------------------------------------------------------------

    async def _assigned(self, partitions: Iterable[int]) -> None:
        self._partitions = tuple(sorted({*self._partitions, *partitions}))
        log.info("serving partitions %s", ", ".join(map(str, self._partitions)) or "none")
        self._beat.set()

    async def _revoked(self, partitions: Iterable[int]) -> None:
        gone = set(partitions)
        self._partitions = tuple(p for p in self._partitions if p not in gone)
        for shell in [shell for shell in self._shells.values() if shell.partition in gone]:
            self._evict(shell, "partition moved")
        self._beat.set()

    # --- sessions -------------------------------------------------------------------------------------

    def _exit_seen(self, report: ExitReport) -> None:
        shell = self._shells.get(report.session)
        if shell is not None:
            shell.exit_seen(report)

    def _evict(self, shell: SessionShell, reason: str) -> None:
        metrics.EVICTIONS.labels(
            reason if reason in ("idle", "moved", "room", "partition moved") else "asked"
        ).inc()
        shell.handle(core.Evict(reason))

    @property
    def sessions(self) -> frozenset[str]:
        """The sessions that this verifier is busy with or holds KV for."""
        return frozenset(self._shells)

    async def take_place(self, shell: SessionShell) -> bool:
        """Whether one more session may hold KV; if it must, the one that has been idle longest goes, and has gone."""
        leaving: SessionShell | None = None
        if len(self._holding) >= self.settings.max_sessions:
            leaving = min(
                (held for held in self._holding if held.idle), key=lambda s: s.last_active_s, default=None
            )
            if leaving is None or time.monotonic() - leaving.last_active_s < self.settings.room_after_s:
                return False
            self._holding.discard(leaving)
        self._holding.add(shell)
        shell.kv_free.clear()
        if leaving is not None:
            self._evict(leaving, "room")
            try:
                async with asyncio.timeout(PLACE_DEADLINE_S):
                    await leaving.kv_free.wait()
            except TimeoutError:
                self._holding.discard(shell)
                return False
        return True

    def leave_place(self, shell: SessionShell) -> None:
        """The engine holds nothing of this session any more."""
        self._holding.discard(shell)
        shell.kv_free.set()

    def forget(self, session: str) -> None:
        """Drop the shell; what its chain still has to do (closing, releasing) goes before a new shell's work."""
        self._shells.pop(session, None)
        self._forgotten.set()

    def done(self, received: Received[DraftsMessage]) -> None:
        """The message needs no reading again."""
        if self._drafts is not None:
            self._drafts.done(received)

    def background(self, work: Coroutine[None, None, None]) -> None:
        """Run something that nobody waits for.

        Bounded by what the reader hands out: an answer holds its message open, and a session has one note under way.
        """
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # --- upkeep ---------------------------------------------------------------------------------------

    async def _heartbeats(self) -> None:
        assert self._info is not None
        while True:
            if not self.engine.healthy():
                raise EngineError("the engine has died; the verifier ends so that it can be started afresh")
            await self._send_heartbeat()
            self._beat.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.settings.heartbeat_s):
                    await self._beat.wait()

    async def _figures(self) -> EngineStats:
        """The engine's figures; the last ones where it is too busy to answer in time for a heartbeat."""
        if self._asked is None:
            self._asked = asyncio.create_task(self.engine.stats())
        if self._stats is None:
            await asyncio.wait([self._asked])
        else:
            await asyncio.wait([self._asked], timeout=self.settings.heartbeat_s / 2)
        if self._asked.done():
            self._stats, self._asked = self._asked.result(), None
            self.passes.fixed_ms, self.passes.row_ms = self._stats.fixed_ms, self._stats.row_ms
        assert self._stats is not None
        return self._stats

    async def _send_heartbeat(self) -> None:
        info = self._info
        assert info is not None
        stats = await self._figures()
        metrics.SESSIONS.set(len(self._holding))
        metrics.ENGINE_SESSIONS.labels("parked").set(stats.parked)
        metrics.ENGINE_SESSIONS.labels("running").set(stats.running)
        metrics.ENGINE_SESSIONS.labels("waiting").set(stats.waiting)
        metrics.KV_USAGE.set(stats.kv_usage)
        metrics.STEP_MS.set(stats.step_ms)
        heartbeat = Heartbeat(
            verifier=self.settings.verifier_name,
            incarnation=self.incarnation,
            model=info.model_name,
            ready=bool(self._partitions) and not self._stopping,
            partitions=self._partitions,
            sessions=len(self._shells),
            max_sessions=info.max_sessions,
            kv_usage=stats.kv_usage,
            kv_capacity_tokens=info.kv_capacity_tokens,
            max_model_len=info.max_model_len,
            step_ms=stats.step_ms,
            stopping=self._stopping,
        )
        try:
            await self.bus.send(heartbeat)
        except OutriderError as error:
            log.warning("heartbeat not sent: %s", error)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self.settings.idle_ttl_s / 4))
            before_s = time.monotonic() - self.settings.idle_ttl_s
            for shell in [s for s in self._shells.values() if s.idle and s.last_active_s < before_s]:
                self._evict(shell, "idle")

    # --- ends -----------------------------------------------------------------------------------------

    async def _finish_open_rounds(self) -> None:
        """Let the rounds that are open end, then give every session back; at most `STOP_DEADLINE_S`."""
        self._stopping = True
        if not self.engine.healthy():
            return
        for shell in list(self._shells.values()):
            self._evict(shell, "stopping")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_DEADLINE_S):
                await self._all_forgotten()
        if self._background:
            await asyncio.wait(self._background, timeout=STOP_DEADLINE_S)
        if self._info is not None and self.engine.healthy():
            await self._send_heartbeat()

    async def _all_forgotten(self) -> None:
        while self._shells:
            self._forgotten.clear()
            await self._forgotten.wait()
        for chain in list(self._chains.values()):
            await chain.drained()

    async def _wind_up(self) -> None:
        if self._asked is not None:
            self._asked.cancel()
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
