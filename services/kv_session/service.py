"""The kv-session service: reads what gateways ask and verifiers tell, and sweeps now and then.

Opens of different sessions are handled side by side, those of one session in order. A message is done once its answer
is published; after a crash it is read again, and the directory recognises it. Any number of kv-sessions share the work.
"""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from typing import Final

from fastapi import FastAPI

from services.kv_session.api import operator_router
from services.kv_session.directory import Directory
from services.kv_session.settings import KvSessionSettings
from shared.bus import Bus, Reader, Received
from shared.errors import BrokerUnavailable, OutriderError, StoreUnavailable
from shared.http import Readiness, create_app
from shared.protocol import Heartbeat, OpenSession, SessionsMessage, Topic
from shared.store import Store
from shared.telemetry import current_trace

GROUP: Final = "outrider-kv-session"
SWEEP_LEASE: Final = "kv-session-sweep"
LANES: Final = 32
LANE_QUEUE: Final = 64
THOROUGH_EVERY: Final = 10
PROBE_S: Final = 2.0
RETRY_S: Final = 0.5

logger = logging.getLogger(__name__)

Request = Received[SessionsMessage]


class KvSessionService:
    """One kv-session process: its HTTP app and its loops."""

    def __init__(self, settings: KvSessionSettings) -> None:
        self.settings = settings
        self.store = Store(settings)
        self.bus = Bus(settings, client=settings.kv_session_name)
        self.directory = Directory(settings, self.store, self.bus)
        self.app: FastAPI = create_app(
            "Outrider kv-session",
            self.readiness,
            description="The directory of sessions and of where their KV lives: the operator's API.",
        )
        self.app.include_router(operator_router(self.directory, self.sweep_soon))
        self._lanes: list[asyncio.Queue[Request]] = [asyncio.Queue(LANE_QUEUE) for _ in range(LANES)]
        self._due = asyncio.Event()
        self._serving = False

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set. Raises `OutriderError` when something it cannot do without is missing."""
        async with self.store, self.bus:
            await self.bus.ensure_topics()
            sessions = self.bus.group_reader(
                Topic.SESSIONS, group=GROUP, member=self.settings.kv_session_name
            )
            heartbeats = self.bus.reader(Topic.HEARTBEATS)
            await self.directory.refresh()
            async with heartbeats, sessions:
                await self._work(stop, sessions, heartbeats)

    async def _work(
        self, stop: asyncio.Event, sessions: Reader[SessionsMessage], heartbeats: Reader[Heartbeat]
    ) -> None:
        self._serving = True
        tasks = [
            asyncio.create_task(stop.wait(), name="stop"),
            asyncio.create_task(self._read_heartbeats(heartbeats), name="heartbeats"),
            asyncio.create_task(self._read_sessions(sessions), name="sessions"),
            asyncio.create_task(self._sweep_regularly(), name="sweep"),
            *(asyncio.create_task(self._handle_lane(lane, sessions), name="lane") for lane in self._lanes),
        ]
        try:
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()
        finally:
            self._serving = False
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def readiness(self) -> Readiness:
        """Ready when it reads the topics and both the broker and the store answer. Verifiers are not its own matter."""
        if not self._serving:
            return Readiness(missing=["starting or stopping"])
        missing = []
        try:
            async with asyncio.timeout(PROBE_S):
                await self.store.ping()
        except (StoreUnavailable, TimeoutError):
            missing.append("Redis does not answer")
        if not await self._broker_answers():
            missing.append("Kafka does not answer")
        notes = list(self.store.info.warnings)
        if not self.directory.fleet.ready(time.monotonic()):
            notes.append("no verifier is ready: sessions are refused")
        return Readiness(missing=missing, notes=notes)

    async def _broker_answers(self) -> bool:
        try:
            async with asyncio.timeout(PROBE_S):
                await self.bus.ensure_topics(())
        except (BrokerUnavailable, TimeoutError):
            return False
        return True

    def sweep_soon(self) -> None:
        """Sweep now rather than at the next tick."""
        self._due.set()

    # --- reading ----------------------------------------------------------------------------------------------

    async def _read_heartbeats(self, heartbeats: Reader[Heartbeat]) -> None:
        async for received in heartbeats:
            self.directory.hear(received.message)
            if received.message.stopping:
                self.sweep_soon()

    async def _read_sessions(self, sessions: Reader[SessionsMessage]) -> None:
        async for received in sessions:
            await self._lanes[zlib.crc32(received.message.session.encode()) % LANES].put(received)

    async def _handle_lane(self, lane: asyncio.Queue[Request], sessions: Reader[SessionsMessage]) -> None:
        while self._serving:
            received = await lane.get()
            current_trace.set(received.trace.child() if received.trace else None)
            await self._handle(received)
            sessions.done(received)

    async def _handle(self, received: Request) -> None:
        """Handle the message for good; a broker or store that is away is waited for."""
        message = received.message
        # Where it was read and when it was written: the same when it is read again, and no other message's.
        request = f"{received.partition}@{received.offset}/{received.timestamp_ms}"
        while True:
            try:
                await self.directory.handle(message, request=request)
                return
            except (StoreUnavailable, BrokerUnavailable) as error:
                logger.warning("%s of %s waits: %s", message.kind, message.session, error)
                await asyncio.sleep(RETRY_S)
            except Exception as error:
                # A message that trips a defect of ours must not stop all that come after it.
                logger.exception("%s of %s failed", message.kind, message.session)
                if not isinstance(message, OpenSession):
                    return
                await self._refuse(message, error)
                return

    async def _refuse(self, message: OpenSession, error: Exception) -> None:
        ours = (
            error if isinstance(error, OutriderError) else OutriderError("kv-session failed on this session")
        )
        try:
            await self.directory.refuse(message, ours)
        except BrokerUnavailable as unavailable:
            logger.warning("refusal of %s not sent: %s", message.session, unavailable)

    # --- sweeping ---------------------------------------------------------------------------------------------

    async def _sweep_regularly(self) -> None:
        count = 0
        while self._serving:
            self._due.clear()
            try:
                await self._sweep(thorough=count % THOROUGH_EVERY == 0)
                count += 1
            except (StoreUnavailable, BrokerUnavailable) as error:
                logger.warning("sweep put off: %s", error)
            try:
                async with asyncio.timeout(self.settings.sweep_s):
                    await self._due.wait()
            except TimeoutError:
                continue

    async def _sweep(self, *, thorough: bool) -> None:
        """One replica sweeps at a time; should two do so, the epochs keep their moves apart.

        While the broker is away no verifier can be heard, so none counts as gone.
        """
        if not await self._broker_answers():
            self.directory.fleet.deaf(time.monotonic())
            raise BrokerUnavailable(f"Kafka at {self.settings.kafka} does not answer")
        await self.directory.refresh()
        lease_s = max(5 * self.settings.sweep_s, 5.0)
        if not await self.store.acquire(SWEEP_LEASE, self.settings.kv_session_name, lease_s):
            return
        await self.directory.finish_moves()
        await self.directory.expire()
        await self.directory.rescue(self.bus.partitions(Topic.DRAFTS), thorough=thorough)
