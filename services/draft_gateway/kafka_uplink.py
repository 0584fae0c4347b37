"""The uplink inside the data centre: Kafka for messages, Redis for what was committed, and a lease in Redis on the
partition on which replies arrive. Hints and verdicts are read by consumers of their own, so that no verdict queues
behind a hint.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final, TypeVar

from services.draft_gateway.uplink import RETRY_S, Receiver, RoundTrip, SessionMessage
from shared.bus import Bus, Reader
from shared.errors import (
    BrokerUnavailable,
    OutriderError,
    Overloaded,
    StoreUnavailable,
    Unavailable,
    error_for,
)
from shared.protocol import (
    CloseSession,
    DraftsMessage,
    Hint,
    OpenSession,
    Placed,
    PlacementsMessage,
    Refused,
    ReplyRoute,
    TokenLogprobs,
    Tokens,
    Topic,
    VerdictsMessage,
)
from shared.session import SessionState
from shared.settings import CommonSettings
from shared.store import Store
from shared.telemetry import TraceContext

logger = logging.getLogger(__name__)

PROBE_S: Final = 2.0

_Read = TypeVar("_Read", bound=PlacementsMessage | Hint | VerdictsMessage)


@dataclass(frozen=True, slots=True, eq=False)
class _Opening:
    """Somebody waits for a placement: this gateway, or one at the edge whose link it relays."""

    gateway: str
    placed: asyncio.Future[Placed]


class KafkaUplink:
    """The uplink inside the data centre."""

    def __init__(self, settings: CommonSettings, *, name: str, lease_s: float) -> None:
        self._settings = settings
        self._lease_s = lease_s
        # A process of its own, whatever its name: a session's driver is told apart from its predecessor by this.
        self._gateway: Final = f"{name}.{secrets.token_hex(4)}"
        self._bus = Bus(settings, client=self._gateway)
        self._store = Store(settings)
        self._stack = AsyncExitStack()
        self._tasks: set[asyncio.Task[None]] = set()
        self._receivers: dict[str, tuple[Receiver, ...]] = {}
        self._opening: dict[str, _Opening] = {}
        self._partition: int | None = None
        self._sent = 0
        self._unacknowledged: dict[int, float] = {}  # when each was sent, oldest first
        self._troubles: dict[str, str] = {"start": "the uplink has not started yet"}

    # --- life --------------------------------------------------------------------------------------

    @property
    def reply(self) -> ReplyRoute:
        """Where hints and verdicts for this gateway are to be sent now."""
        if self._partition is None:
            raise Unavailable(f"not ready: {'; '.join(self.troubles())}", retry_after_s=RETRY_S)
        return ReplyRoute(gateway=self._gateway, partition=self._partition)

    @property
    def round_trip(self) -> RoundTrip | None:
        """Nothing worth measuring: a hop takes 1–2 ms."""
        return None

    def troubles(self) -> Sequence[str]:
        """Why it can't serve now."""
        return tuple(self._troubles.values())

    def notes(self) -> Sequence[str]:
        """Nothing."""
        return ()

    async def start(self) -> None:
        """Connect to Redis and Kafka, take a reply partition and listen on it. Unavailable says what is missing."""
        stack = AsyncExitStack()
        try:
            await stack.enter_async_context(self._store)
            await stack.enter_async_context(self._bus)
            await self._bus.ensure_topics()
            placements = await stack.enter_async_context(self._bus.reader(Topic.PLACEMENTS))
            partition = await self._acquire()
            exits, verdicts = await self._listen(stack, partition)
        except BaseException as error:
            await stack.aclose()
            if isinstance(error, OutriderError):
                self._troubles["start"] = error.message
            raise
        self._stack = stack
        self._partition = partition
        self._read(placements)
        self._read(exits)
        self._read(verdicts)
        self._run(self._keep("lease", self._renew))
        self._run(self._keep("probe", self._watch_broker))
        self._troubles.clear()
        logger.info("replies arrive at partition %d", partition)

    async def stop(self) -> None:
        """Give the lease up and disconnect."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._troubles["start"] = "the uplink has stopped"
        partition, self._partition = self._partition, None
        if partition is not None:
            try:
                await self._store.free(_lease(partition), self._gateway)
            except StoreUnavailable as error:
                logger.warning("the lease on reply partition %d lapses by itself: %s", partition, error)
        await self._stack.aclose()

    async def _listen(
        self, stack: AsyncExitStack, partition: int
    ) -> tuple[Reader[Hint], Reader[VerdictsMessage]]:
        exits = await stack.enter_async_context(self._bus.reader(Topic.EXITS, partitions=(partition,)))
        verdicts = await stack.enter_async_context(self._bus.reader(Topic.VERDICTS, partitions=(partition,)))
        return exits, verdicts

    # --- the lease on a reply partition ------------------------------------------------------------

    async def _acquire(self) -> int:
        count = self._bus.partitions(Topic.VERDICTS)
        for partition in range(count):
            if await self._store.acquire(_lease(partition), self._gateway, self._lease_s):
                return partition
        raise Overloaded(
            f"all {count} reply partitions are taken by other gateways: run fewer, or create the exits and "
            "verdicts topics with more partitions (OUTRIDER_REPLY_PARTITIONS)",
            retry_after_s=self._lease_s,
        )

    async def _keep(self, watch: str, step: Callable[[], Awaitable[None]]) -> None:
        """Take `step` three times a lease; while it fails, that is why this gateway can't serve."""
        while True:
            await asyncio.sleep(self._lease_s / 3)
            try:
                await step()
                self._troubles.pop(watch, None)
            except OutriderError as error:
                self._troubles[watch] = error.message

    async def _renew(self) -> None:
        """Renew the lease, or take it again after Redis lost it, or go on at another partition.

        Replies to what was sent before still arrive at the old one, so that is read on: readers take their own
        sessions' messages only.
        """
        assert self._partition is not None
        lease = _lease(self._partition)
        if await self._store.acquire(lease, self._gateway, self._lease_s):
            return
        partition = await self._acquire()
        exits, verdicts = await self._listen(self._stack, partition)
        self._read(exits)
        self._read(verdicts)
        logger.warning(
            "lost the lease on reply partition %d, replies now arrive at %d", self._partition, partition
        )
        self._partition = partition

    # --- reading -----------------------------------------------------------------------------------

    def _read(self, reader: Reader[_Read]) -> None:
        self._run(self._pump(reader))

    def _run(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pump(self, reader: Reader[_Read]) -> None:
        async for received in reader:
            self._hand_over(received.message)

    def _hand_over(self, message: SessionMessage | Refused) -> None:
        if isinstance(message, Refused):
            if (waiting := self._waiting_for(message)) is not None:
                waiting.set_exception(
                    error_for(message.code, message.message, retry_after_s=message.retry_after_s)
                )
            return
        receivers = self._receivers.get(message.session, ())
        if isinstance(message, Placed) and message.reason != "moved":
            waiting = self._waiting_for(message)
            if waiting is not None:
                waiting.set_result(message)
                receivers = receivers[:-1]  # who drove it in this process until now
        for receiver in receivers:
            receiver(message)

    def _waiting_for(self, message: Placed | Refused) -> asyncio.Future[Placed] | None:
        opening = self._opening.get(message.session)
        mine = opening is not None and message.reply.gateway == opening.gateway
        return opening.placed if opening is not None and mine and not opening.placed.done() else None

    def subscribe(self, session: str, receiver: Receiver) -> None:
        """Hand every message for the session to `receiver`."""
        self.unsubscribe(session, receiver)
        self._receivers[session] = (*self._receivers.get(session, ()), receiver)

    def unsubscribe(self, session: str, receiver: Receiver) -> None:
        """Stop that."""
        others = tuple(known for known in self._receivers.get(session, ()) if known != receiver)
        if others:
            self._receivers[session] = others
        else:
            self._receivers.pop(session, None)

    # --- writing -----------------------------------------------------------------------------------

    async def open(
        self, message: OpenSession, *, timeout_s: float, trace: TraceContext | None = None
    ) -> Placed:
        """Open or resume a session through kv-session."""
        opening = _Opening(message.reply.gateway, asyncio.get_running_loop().create_future())
        self._opening[message.session] = opening
        silent = f"Kafka at {self._settings.kafka}"
        try:
            async with asyncio.timeout(timeout_s):
                await self._send(message, None, trace)
                silent = "kv-session"
                return await opening.placed
        except TimeoutError:
            raise Unavailable(
                f"{silent} did not answer within {timeout_s:g} s: check that it runs and can be reached",
                retry_after_s=RETRY_S,
            ) from None
        finally:
            if self._opening.get(message.session) is opening:
                del self._opening[message.session]

    async def send(
        self, message: DraftsMessage, *, partition: int, trace: TraceContext | None = None
    ) -> None:
        """Send to the verifier that holds `partition` of the drafts topic."""
        await self._send(message, partition, trace)

    async def close(self, message: CloseSession) -> None:
        """Tell kv-session that this gateway is done with a session."""
        await self._send(message, None, None)

    async def _send(
        self,
        message: DraftsMessage | OpenSession | CloseSession,
        partition: int | None,
        trace: TraceContext | None,
    ) -> None:
        self._sent += 1
        number = self._sent
        self._unacknowledged[number] = asyncio.get_running_loop().time()
        try:
            await self._bus.send(message, partition=partition, trace=trace)
        except BrokerUnavailable as error:
            self._troubles["broker"] = error.message
            raise
        finally:
            del self._unacknowledged[number]
        self._troubles.pop("broker", None)

    async def _watch_broker(self) -> None:
        """Notice a broker that takes nothing, and that it is back."""
        if self._unacknowledged:
            waited_s = asyncio.get_running_loop().time() - next(iter(self._unacknowledged.values()))
            if waited_s > self._lease_s:
                self._troubles["broker"] = (
                    f"Kafka at {self._settings.kafka} has taken nothing for {waited_s:.0f} s"
                )
        elif "broker" in self._troubles:
            await self.probe()

    async def probe(self) -> None:
        """Ask the broker for a sign of life."""
        if self._partition is None:
            return
        try:
            async with asyncio.timeout(PROBE_S):
                await self._bus.ensure_topics(())
        except (BrokerUnavailable, TimeoutError):
            self._troubles["broker"] = f"Kafka at {self._settings.kafka} does not answer"
        else:
            self._troubles.pop("broker", None)

    # --- what was committed ------------------------------------------------------------------------

    async def state(self, session: str) -> SessionState | None:
        """A session's record in Redis."""
        return await self._store.state(session)

    async def prompt(self, session: str) -> Tokens:
        """A session's prompt, from Redis."""
        return await self._store.prompt(session)

    async def tokens(self, session: str, since: int = 0) -> Tokens:
        """A session's committed tokens from position `since` on, from Redis."""
        return await self._store.tokens(session, since)

    async def logprobs(self, session: str, since: int = 0) -> tuple[TokenLogprobs, ...]:
        """The log-probabilities of a session's committed tokens from position `since` on, from Redis."""
        return await self._store.logprobs(session, since)


def _lease(partition: int) -> str:
    return f"reply:{partition}"
