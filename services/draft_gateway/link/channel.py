"""One connection of a link, seen from either end: sends, receives, measures, and drops what is no use late.

Every session has a bounded queue of its own and they take turns, so that one cannot starve another. A ping goes out
every second and after every 2 KiB; its pong tells the round trip and that all sent before it has arrived. From that
follow the bytes on their way (no more than a window, so that what waits, waits here, where it can still be dropped) and
the delay by queues in between: by how much the round trip is above its least of late (a way may change, so that the least
is that of the last `LEAST_S`, as in BBR, draft-ietf-ccwg-bbr). When that delay grows beyond `slow_ms` hints are dropped,
which are of no use late. A forward is: its sender counts on it, since it becomes the next block where it comes true; it
goes only where its session's queue overflows. Nothing else is ever dropped: when it can't be delivered in time the
connection is given up, and the edge catches up over the next one.

What the frames mean is for `client.py` and `server.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

from services.draft_gateway.link.codec import Names, UnknownKind, UnknownSession
from services.draft_gateway.link.frames import ADVICE, Frame, Ping, Pong, decode, encode
from services.draft_gateway.link.metrics import Meter
from services.draft_gateway.uplink import RoundTrip
from shared.errors import ProtocolError, Unavailable
from shared.protocol import Hint

PING_S: Final = 1.0
PING_BYTES: Final = 2048
WINDOW: Final = 64 << 10
LEAST_S: Final = 10.0
CLOSE_S: Final = 1.0

# Close codes of RFC 6455.
NORMAL, GOING_AWAY, FAULTY, FAILED, TOO_SLOW = 1000, 1001, 1002, 1011, 1013
LONGEST_REASON: Final = 123

logger = logging.getLogger(__name__)


class LinkLost(Unavailable):
    """The connection is no more; `close_code` is what its end is told, where there is still one to tell."""

    code = "link_lost"

    def __init__(self, message: str, *, close_code: int = GOING_AWAY) -> None:
        super().__init__(message)
        self.close_code = close_code


class Socket(Protocol):
    """A WebSocket that is open. All but `close` raise `LinkLost` once it isn't."""

    async def send(self, payload: bytes) -> None:
        """Send a binary message; returns when there is room for another."""
        ...

    async def receive(self) -> bytes:
        """The next binary message."""
        ...

    async def close(self, code: int, reason: str) -> None:
        """Close it."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """`queue`: frames a session may have waiting. `slow_ms`: delay by queues from which hints are dropped. `timeout_s`:
    how long a ping, or a frame that waits for its turn, may take before the connection is given up."""

    queue: int
    slow_ms: float
    timeout_s: float


@dataclass(frozen=True, slots=True)
class _Waiting:
    payload: bytes
    advice: bool
    fleeting: bool
    since_s: float


class Channel:
    """One connection. `run` is its life; `push` and `put` send."""

    def __init__(
        self,
        socket: Socket,
        names: Names,
        limits: Limits,
        meter: Meter,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock` tells seconds; it is what round trips and delays are measured by."""
        self._socket = socket
        self._names = names
        self._limits = limits
        self._meter = meter
        self._now_s = clock
        self._loop = asyncio.get_running_loop()
        self._urgent: deque[bytes] = deque()
        self._queues: OrderedDict[int, deque[_Waiting]] = OrderedDict()
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._pings: OrderedDict[int, tuple[float, int]] = (
            OrderedDict()
        )  # when, and how much was sent up to it
        self._next_ping = 0
        self._sent = 0
        self._arrived = 0  # of what was sent, as far as we know
        self._round_trip: RoundTrip | None = None
        self._samples: deque[tuple[float, float]] = deque()  # when, and how long it took, ms
        self._lost: asyncio.Future[LinkLost] = self._loop.create_future()

    # --- what is known of it -----------------------------------------------------------------------

    @property
    def round_trip(self) -> RoundTrip | None:
        """The round trip over this connection; None before the first pong."""
        return self._round_trip

    @property
    def lost(self) -> bool:
        """It has been given up."""
        return self._lost.done()

    @property
    def queued_ms(self) -> float:
        """By how much queues on the way delay what is sent now, as far as pings tell."""
        trip = self._round_trip
        if trip is None:
            return 0.0
        waited_ms = 0.0
        if self._pings:
            sent_s, _ = next(iter(self._pings.values()))
            waited_ms = (self._now_s() - sent_s) * 1000
        return max(waited_ms, trip.last_ms) - trip.minimum_ms

    @property
    def slow(self) -> bool:
        """Hints are dropped now."""
        return self.queued_ms > self._limits.slow_ms

    # --- sending -----------------------------------------------------------------------------------

    def push(self, frame: Frame, queue: int = 0) -> None:
        """Send without waiting. A queue (a session's number) that overflows gives the connection up, unless advice can
        be dropped. Queue 0 is unbounded: for what is bounded by who asks for it."""
        payload = encode(frame, self._names)
        if self._make_room(queue, advice=isinstance(frame, ADVICE)):
            self._enqueue(frame, payload, queue)

    async def put(self, frame: Frame, queue: int) -> None:
        """Send, after waiting for room. Raises `LinkLost`, `Unavailable` when there is no room in time."""
        payload = encode(frame, self._names)
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                while self._full(queue) and not self.lost:
                    self._room.clear()
                    await self._room.wait()
        except TimeoutError:
            raise Unavailable(f"the link took nothing for {self._limits.timeout_s:g} s") from None
        if self.lost:
            raise self._lost.result()
        self._enqueue(frame, payload, queue)

    def _full(self, queue: int) -> bool:
        return queue != 0 and len(self._queues.get(queue, ())) >= self._limits.queue

    def _make_room(self, queue: int, *, advice: bool) -> bool:
        if not self._full(queue):
            return True
        waiting = self._queues[queue]
        oldest = next((frame for frame in waiting if frame.fleeting), None)
        oldest = oldest or next((frame for frame in waiting if frame.advice), None)
        if oldest is not None:
            waiting.remove(oldest)
            self._meter.dropped.inc()
            return True
        if advice:
            self._meter.dropped.inc()
        else:
            self.give_up(f"{len(waiting)} frames of one session wait already", TOO_SLOW)
        return False

    def _enqueue(self, frame: Frame, payload: bytes, queue: int) -> None:
        if self.lost:
            return
        waiting = _Waiting(payload, isinstance(frame, ADVICE), isinstance(frame, Hint), self._now_s())
        self._queues.setdefault(queue, deque()).append(waiting)
        self._wake.set()

    def forget(self, queue: int) -> None:
        """Send nothing more of what waits in a queue."""
        self._queues.pop(queue, None)
        self._room.set()

    def give_up(self, reason: str, close_code: int = GOING_AWAY) -> None:
        """End the connection."""
        if not self._lost.done():
            self._lost.set_result(LinkLost(reason, close_code=close_code))
        self._room.set()

    # --- its life ----------------------------------------------------------------------------------

    async def run(self, receive: Callable[[Frame], None]) -> LinkLost:
        """Hand every frame to `receive` until the connection ends; why it did. `receive` may raise `ProtocolError`.

        The socket is still to be closed then.
        """
        tasks = [self._loop.create_task(work) for work in (self._read(receive), self._write(), self._watch())]
        try:
            ends: set[asyncio.Future[Any]] = {*tasks, self._lost}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done() and (error := task.exception()) is not None:
                    self._fail(error)
            return self._lost.result()
        finally:
            self.give_up("the gateway stops")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        """Close the socket, once the connection is given up; returns in time whatever the peer does."""
        lost = self._lost.result()
        with suppress(TimeoutError, LinkLost):
            async with asyncio.timeout(CLOSE_S):
                await self._socket.close(lost.close_code, lost.message[:LONGEST_REASON])

    def _fail(self, error: BaseException) -> None:
        match error:
            case LinkLost():
                self.give_up(error.message, error.close_code)
            case ProtocolError():
                self.give_up(error.message, FAULTY)
            case _:
                logger.error("the link failed", exc_info=error)
                self.give_up("it failed here; the log says why", FAILED)

    async def _read(self, receive: Callable[[Frame], None]) -> None:
        while True:
            payload = await self._socket.receive()
            self._meter.received(payload)
            try:
                frame = decode(payload, self._names)
            except UnknownSession:
                continue  # its last messages and its release have crossed
            except UnknownKind as error:
                logger.warning("passed over: %s", error)
                continue
            match frame:
                case Ping(number):
                    self._urgent.append(encode(Pong(number), self._names))
                    self._wake.set()
                case Pong(number):
                    self._ponged(number)
                case _:
                    receive(frame)

    async def _write(self) -> None:
        unpinged = 0
        while True:
            payload = self._next()
            if payload is None:
                self._wake.clear()
                await self._wake.wait()
                continue
            await self._socket.send(payload)
            self._sent += len(payload)
            unpinged += len(payload)
            self._meter.sent(payload)
            if unpinged >= PING_BYTES:
                unpinged = 0
                await self._ping()

    async def _ping(self) -> None:
        self._next_ping += 1
        payload = encode(Ping(self._next_ping), self._names)
        self._pings[self._next_ping] = (self._now_s(), self._sent)
        await self._socket.send(payload)
        self._meter.sent(payload)

    def _next(self) -> bytes | None:
        if self._urgent:
            return self._urgent.popleft()
        if self._sent - self._arrived >= WINDOW:
            return None
        while self._queues:
            queue, waiting = self._queues.popitem(last=False)
            frame = waiting.popleft() if waiting else None
            if waiting:
                self._queues[queue] = waiting  # behind the others
            self._room.set()
            if frame is not None and not (frame.fleeting and self.slow):
                return frame.payload
            if frame is not None:
                self._meter.dropped.inc()
        return None

    def _ponged(self, number: int) -> None:
        if number not in self._pings:
            raise ProtocolError(f"a pong to ping {number}, which does not wait for one")
        while number in self._pings:
            _, (sent_s, sent) = self._pings.popitem(last=False)
        self._arrived = sent
        sample_ms = (self._now_s() - sent_s) * 1000
        self._samples.append((self._now_s(), sample_ms))
        while self._samples[0][0] < self._now_s() - LEAST_S:
            self._samples.popleft()
        least_ms = min(taken_ms for _, taken_ms in self._samples)
        before = self._round_trip
        if before is None:
            self._round_trip = RoundTrip(sample_ms, sample_ms, least_ms)
        else:  # smoothed as TCP does it, RFC 6298
            smoothed_ms = before.smoothed_ms + (sample_ms - before.smoothed_ms) / 8
            self._round_trip = RoundTrip(sample_ms, smoothed_ms, least_ms)
        self._meter.measured(sample_ms)
        self._wake.set()

    async def _watch(self) -> None:
        timeout_s = self._limits.timeout_s
        while True:
            now_s = self._now_s()
            if self._pings and now_s - next(iter(self._pings.values()))[0] > timeout_s:
                raise LinkLost(f"no answer for {timeout_s:g} s")
            oldest_s = min((queue[0].since_s for queue in self._queues.values() if queue), default=now_s)
            if now_s - oldest_s > timeout_s:
                raise LinkLost(f"a frame has waited for {timeout_s:g} s", close_code=TOO_SLOW)
            if not self._pings:
                await self._ping()
            await asyncio.sleep(min(PING_S, timeout_s / 4))
