"""One connection of a link: what it drops and what never, how it measures, when it gives up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from services.draft_gateway.link.channel import (
    FAULTY,
    GOING_AWAY,
    LEAST_S,
    TOO_SLOW,
    WINDOW,
    Channel,
    Limits,
    LinkLost,
)
from services.draft_gateway.link.codec import UnknownSession
from services.draft_gateway.link.frames import Frame, Ping, Pong, decode, encode
from services.draft_gateway.link.metrics import Meter
from shared.errors import ProtocolError, Unavailable
from shared.protocol import Forward, Hint, ReplyRoute, Tokens, Verdict

SESSIONS = ("cmpl-a", "cmpl-b")
LONG = tuple(range(70_000, 70_700))


class Agreed:
    reply = ReplyRoute(gateway="edge-0.abcd", partition=3)

    def number(self, session: str) -> int:
        return SESSIONS.index(session) + 1

    def session(self, number: int) -> str:
        if not 0 < number <= len(SESSIONS):
            raise UnknownSession(f"no session {number}")
        return SESSIONS[number - 1]


NAMES = Agreed()


class Wire:
    """The other end, in the test's hands: what was sent, what comes back, whether it takes anything now."""

    def __init__(self) -> None:
        self.sent: list[Frame] = []
        self.closed: tuple[int, str] | None = None
        self.takes = asyncio.Event()
        self.takes.set()
        self._back: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def send(self, payload: bytes) -> None:
        await self.takes.wait()
        self.sent.append(decode(payload, NAMES))

    async def receive(self) -> bytes:
        payload = await self._back.get()
        if payload is None:
            raise LinkLost("the connection broke")
        return payload

    async def close(self, code: int, reason: str) -> None:
        self.closed = (code, reason)

    def give(self, payload: bytes | None) -> None:
        self._back.put_nowait(payload)

    def pings(self) -> list[int]:
        return [frame.number for frame in self.sent if isinstance(frame, Ping)]

    def answer_ping(self) -> None:
        self.give(encode(Pong(self.pings()[-1]), NAMES))

    def rounds(self) -> list[tuple[str, int]]:
        return [
            (type(frame).__name__, frame.round)
            for frame in self.sent
            if isinstance(frame, Forward | Hint | Verdict)
        ]


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def hint(number: int, session: str = SESSIONS[0]) -> Hint:
    return Hint(session=session, epoch=1, round=number, base=1, layer=3, outcomes=())


def forward(number: int, session: str = SESSIONS[0]) -> Forward:
    return Forward(
        session=session,
        epoch=1,
        reply=NAMES.reply,
        round=number,
        base=4,
        parent=0,
        accepted=1,
        next_token=7,
        tokens=(5,),
    )


def verdict(number: int, session: str = SESSIONS[0], tokens: Tokens = (5,)) -> Verdict:
    return Verdict(session=session, epoch=1, round=number, base=1, accepted=0, tokens=tokens)


async def until(holds: Callable[[], object]) -> None:
    """Let the loop run until `holds()`; the test's own timeout bounds it."""
    while not holds():  # noqa: ASYNC110 - whatever the test waits for has no event
        await asyncio.sleep(0.001)


class Running:
    def __init__(
        self, wire: Wire, clock: Clock, channel: Channel, received: list[Frame], meter: Meter
    ) -> None:
        self.wire, self.clock, self.channel, self.received, self.meter = wire, clock, channel, received, meter
        self.ended = asyncio.create_task(channel.run(received.append))

    async def measure_first(self, round_trip_s: float) -> None:
        """Have the ping that a connection begins with answered after so long."""
        self.clock.now_s += round_trip_s
        self.wire.answer_ping()
        await until(lambda: self.channel.round_trip is not None)

    async def measure(self, round_trip_s: float) -> None:
        """Have a ping answered after so long."""
        pings = len(self.wire.pings())
        while len(self.wire.pings()) == pings:
            self.channel.push(verdict(0, tokens=LONG), 1)
            await asyncio.sleep(0.001)
        self.clock.now_s += round_trip_s
        before = self.channel.round_trip
        self.wire.answer_ping()
        await until(lambda: self.channel.round_trip != before)


@asynccontextmanager
async def running(
    *, queue: int = 8, slow_ms: float = 50.0, timeout_s: float = 30.0
) -> AsyncIterator[Running]:
    wire, clock, received, meter = Wire(), Clock(), list[Frame](), Meter("cloud")
    channel = Channel(wire, NAMES, Limits(queue, slow_ms, timeout_s), meter, clock=clock)
    it = Running(wire, clock, channel, received, meter)
    await until(wire.pings)
    try:
        yield it
    finally:
        it.ended.cancel()
        await asyncio.gather(it.ended, return_exceptions=True)


async def test_what_is_pushed_is_sent_at_once_and_in_order() -> None:
    async with running() as it:
        for number in range(1, 5):
            it.channel.push(hint(number), 1)
            it.channel.push(verdict(number), 1)
        await until(lambda: len(it.wire.rounds()) == 8)
        assert it.wire.rounds() == [(kind, number) for number in range(1, 5) for kind in ("Hint", "Verdict")]


async def test_pings_tell_the_round_trip_last_smoothed_and_least() -> None:
    async with running() as it:
        assert it.channel.round_trip is None
        await it.measure_first(0.050)
        await it.measure(0.090)
        trip = it.channel.round_trip
        assert trip is not None
        assert (trip.last_ms, trip.minimum_ms) == (pytest.approx(90), pytest.approx(50))
        assert trip.smoothed_ms == pytest.approx(55)


async def test_a_slow_link_drops_hints_and_no_verdict_until_it_is_quick_again() -> None:
    async with running() as it:
        await it.measure_first(0.010)
        assert not it.channel.slow
        await it.measure(0.300)  # 290 ms of it in queues
        assert it.channel.slow
        for number in range(1, 4):
            it.channel.push(hint(number), 1)
            it.channel.push(verdict(number), 1)
        await until(lambda: ("Verdict", 3) in it.wire.rounds())
        assert not [kind for kind, _ in it.wire.rounds() if kind == "Hint"]
        assert it.meter.dropped.value == 3
        await it.measure(0.010)
        it.channel.push(hint(4), 1)
        await until(lambda: ("Hint", 4) in it.wire.rounds())


async def test_a_slow_link_keeps_forwards_whose_senders_count_on_them() -> None:
    async with running() as it:
        await it.measure_first(0.010)
        await it.measure(0.300)
        assert it.channel.slow
        it.channel.push(hint(1), 1)
        it.channel.push(forward(1), 1)
        await until(lambda: ("Forward", 1) in it.wire.rounds())
        assert it.meter.dropped.value == 1


async def test_a_way_that_has_become_longer_is_not_slow_for_ever() -> None:
    async with running() as it:
        await it.measure_first(0.010)
        await it.measure(0.200)
        assert it.channel.slow
        it.clock.now_s += LEAST_S
        await it.measure(0.200)
        assert not it.channel.slow
        trip = it.channel.round_trip
        assert trip is not None and trip.minimum_ms == pytest.approx(200)


async def test_where_a_queue_is_full_forwards_make_room_after_hints() -> None:
    async with running(queue=3) as it:
        it.wire.takes.clear()
        it.channel.push(verdict(0), 1)  # the one that the writer holds in its hands
        await asyncio.sleep(0)
        for frame in (forward(1), hint(2), verdict(3), verdict(4), verdict(5)):
            it.channel.push(frame, 1)
        assert it.meter.dropped.value == 2
        assert not it.channel.lost
        it.wire.takes.set()
        await until(lambda: len(it.wire.rounds()) == 4)
        assert [number for _, number in it.wire.rounds()] == [0, 3, 4, 5]


async def test_a_ping_that_stays_out_makes_a_link_slow_before_its_answer() -> None:
    async with running() as it:
        it.wire.answer_ping()
        await until(lambda: it.channel.round_trip is not None)
        pings = len(it.wire.pings())
        while len(it.wire.pings()) == pings:
            it.channel.push(verdict(0, tokens=LONG), 1)
            await asyncio.sleep(0.001)
        assert not it.channel.slow
        it.clock.now_s += 0.2
        assert it.channel.slow


async def test_where_a_queue_is_full_hints_make_room_and_what_else_overflows_ends_the_link() -> None:
    async with running(queue=4) as it:
        it.wire.takes.clear()
        it.channel.push(verdict(0), 1)  # the one that the writer holds in its hands
        await asyncio.sleep(0)
        await until(lambda: not it.channel.lost)
        for number in (1, 2):
            it.channel.push(hint(number), 1)
            it.channel.push(verdict(number), 1)
        for number in (3, 4):
            it.channel.push(verdict(number), 1)
        it.channel.push(hint(5), 1)
        assert it.meter.dropped.value == 3
        assert not it.channel.lost
        it.channel.push(verdict(6), 1)
        lost = await it.ended
        assert lost.close_code == TOO_SLOW
        assert "wait already" in lost.message


async def test_one_session_waits_for_its_turn_only_behind_one_frame_of_each_other() -> None:
    async with running() as it:
        for number in range(1, 5):
            it.channel.push(verdict(number, SESSIONS[0]), 1)
        it.channel.push(verdict(9, SESSIONS[1]), 2)
        await until(lambda: len(it.wire.rounds()) == 5)
        assert ("Verdict", 9) in it.wire.rounds()[:2]


async def test_no_more_is_on_its_way_than_the_window_so_that_what_waits_can_still_be_dropped() -> None:
    async with running(queue=1000) as it:
        size = len(encode(verdict(0, tokens=LONG), NAMES))
        count = 2 * WINDOW // size
        for number in range(count):
            it.channel.push(verdict(number, tokens=LONG), 1)
        await until(lambda: it.meter.traffic().bytes_down >= WINDOW)
        for _ in range(10):
            await asyncio.sleep(0)
        assert it.meter.traffic().bytes_down < WINDOW + 2 * size
        while len(it.wire.rounds()) < count:
            it.wire.answer_ping()
            await asyncio.sleep(0.001)
        assert [number for _, number in it.wire.rounds()] == list(range(count))


async def test_who_waits_for_room_is_told_in_time() -> None:
    async with running(queue=1, timeout_s=0.2) as it:
        it.wire.takes.clear()
        with pytest.raises(Unavailable):
            for number in range(9):
                await it.channel.put(verdict(number), 1)


async def test_a_ping_without_an_answer_ends_the_link() -> None:
    async with running(timeout_s=0.2) as it:
        it.clock.now_s += 1
        lost = await it.ended
        assert "no answer" in lost.message
        await it.channel.close()
        assert it.wire.closed == (GOING_AWAY, lost.message)
        with pytest.raises(LinkLost):
            await it.channel.put(verdict(1), 1)


async def test_a_garbled_frame_ends_the_link_with_a_reason() -> None:
    async with running() as it:
        it.wire.give(b"\x05\x01")
        lost = await it.ended
        await it.channel.close()
        assert it.wire.closed == (FAULTY, lost.message)
        assert "Verdict: cut short" in lost.message


async def test_frames_of_the_future_and_of_sessions_past_are_passed_over() -> None:
    async with running() as it:
        it.wire.give(b"\x7e\x01")
        it.wire.give(encode(verdict(1), NAMES).replace(b"\x05\x01", b"\x05\x09", 1))
        it.wire.give(encode(verdict(2), NAMES))
        await until(lambda: it.received)
        assert it.received == [verdict(2)]


async def test_a_pong_to_no_ping_is_a_fault() -> None:
    async with running() as it:
        it.wire.give(encode(Pong(99), NAMES))
        assert (await it.ended).close_code == FAULTY


async def test_a_receiver_that_fails_ends_this_link_only_and_with_a_reason() -> None:
    wire = Wire()
    channel = Channel(wire, NAMES, Limits(8, 50, 30), Meter("edge"))

    def refuse(frame: Frame) -> None:
        raise ProtocolError("not that")

    wire.give(encode(verdict(1), NAMES))
    assert (await channel.run(refuse)).message == "not that"


async def test_pings_are_answered_before_anything_that_waits() -> None:
    async with running() as it:
        it.wire.takes.clear()
        for number in range(5):
            it.channel.push(verdict(number), 1)
        it.wire.give(encode(Ping(41), NAMES))
        await asyncio.sleep(0.01)
        it.wire.takes.set()
        await until(lambda: Pong(41) in it.wire.sent)
        assert it.wire.sent.index(Pong(41)) <= it.wire.sent.index(verdict(1))
