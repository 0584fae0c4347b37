"""The bus against a real broker: what arrives, in which order, and what survives whose death."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from prometheus_client import CollectorRegistry

from shared.bus import MAX_HINTS_IN_FLIGHT, Bus, MemberNameTaken, Reader, Received
from shared.errors import BrokerUnavailable, ProtocolError
from shared.kafka.wire import PRODUCE, Connection, OnReply
from shared.protocol import (
    SCHEMA_VERSION,
    AnyMessage,
    Block,
    DeadLetter,
    Hint,
    Outcome,
    ReplyRoute,
    Topic,
    Verdict,
    encode,
)
from shared.settings import CommonSettings, KafkaFlavor
from shared.stack.kafka import Broker
from shared.stack.ports import free_port
from shared.telemetry import TraceContext

pytestmark = pytest.mark.kafka

ROUTE = ReplyRoute(gateway="gateway-0", partition=0)
DRAFTS_PARTITIONS = 4
M = TypeVar("M", bound=AnyMessage)


def block(number: int, session: str = "session-1") -> Block:
    return Block(session=session, epoch=1, reply=ROUTE, round=number, base=number, tokens=(1, 2, 3))


def verdict(number: int) -> Verdict:
    return Verdict(session="session-1", epoch=1, round=number, base=number, accepted=1, tokens=(1, 2))


def hint(number: int) -> Hint:
    outcome = Outcome(accepted=1, next_token=2, confidence=0.5)
    return Hint(session="session-1", epoch=1, round=number, base=number, layer=9, outcomes=(outcome,))


def settings_for(broker: Broker, **changes: object) -> CommonSettings:
    values: dict[str, object] = {
        "kafka": broker.address,
        "kafka_flavor": broker.flavor,
        "topic_prefix": f"test-{uuid.uuid4().hex[:8]}.",
        "drafts_partitions": DRAFTS_PARTITIONS,
        "reply_partitions": 2,
        "sessions_partitions": 2,
        **changes,
    }
    return CommonSettings.model_validate(values)


@pytest.fixture
def bus_settings(kafka_broker: Broker) -> CommonSettings:
    return settings_for(kafka_broker)


@pytest.fixture
def static_members(kafka_broker: Broker) -> None:
    """Skips where the broker forgets a member's name."""
    if kafka_broker.flavor is KafkaFlavor.TANSU:
        pytest.skip("Tansu knows no static membership")


@pytest.fixture
async def bus(bus_settings: CommonSettings) -> AsyncIterator[Bus]:
    async with Bus(bus_settings, client="test") as bus:
        await bus.ensure_topics()
        yield bus


async def take(reader: Reader[M], count: int, within_s: float = 20.0) -> list[Received[M]]:
    """The next `count` messages, all within the deadline."""
    async with asyncio.timeout(within_s):
        return [await anext(reader) for _ in range(count)]


async def nothing_more(reader: Reader[M], within_s: float = 0.5) -> bool:
    try:
        async with asyncio.timeout(within_s):
            await anext(reader)
    except TimeoutError:
        return True
    return False


async def until(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not so within {within_s} s"
        await asyncio.sleep(0.01)


# --- what arrives, and in which order ---------------------------------------------------------------------------


async def test_messages_to_a_partition_are_read_there_in_order(bus: Bus) -> None:
    async with (
        bus.reader(Topic.VERDICTS, partitions=[0]) as other,
        bus.reader(Topic.VERDICTS, partitions=[1]) as reader,
    ):
        assert reader.assigned == {1}
        for number in range(20):
            await bus.send(verdict(number), partition=1)
        received = await take(reader, 20)
        assert [each.message for each in received] == [verdict(number) for number in range(20)]
        assert [each.offset for each in received] == list(range(20))
        assert {(each.topic, each.partition) for each in received} == {(Topic.VERDICTS, 1)}
        assert await nothing_more(other)


async def test_concurrent_sends_to_a_partition_keep_the_order_in_which_they_began(bus: Bus) -> None:
    async with bus.reader(Topic.VERDICTS, partitions=[0]) as reader:
        await asyncio.gather(*(bus.send(verdict(number), partition=0) for number in range(200)))
        received = await take(reader, 200)
        assert [each.message for each in received] == [verdict(number) for number in range(200)]


async def test_messages_of_a_session_keep_their_order_without_a_partition(bus: Bus) -> None:
    async with bus.reader(Topic.DRAFTS) as reader:
        for number in range(10):
            for session in ("a", "b", "c", "d", "e"):
                await bus.send(block(number, session))
        received = await take(reader, 50)
        for session in ("a", "b", "c", "d", "e"):
            own = [
                each
                for each in received
                if isinstance(each.message, Block) and each.message.session == session
            ]
            assert len({each.partition for each in own}) == 1
            assert [each.message for each in own] == [block(number, session) for number in range(10)]
        assert len({each.partition for each in received}) > 1


async def test_a_reader_from_the_latest_reads_all_that_is_sent_after_it_started_and_nothing_else(
    bus: Bus,
) -> None:
    for number in range(5):
        await bus.send(verdict(number), partition=0)
    async with bus.reader(Topic.VERDICTS) as reader:
        await bus.send(verdict(5), partition=0)
        await bus.send(verdict(6), partition=1)
        received = await take(reader, 2)
        assert {each.message.round for each in received} == {5, 6}


async def test_a_reader_from_the_earliest_reads_everything(bus: Bus) -> None:
    for number in range(5):
        await bus.send(verdict(number), partition=number % 2)
    async with bus.reader(Topic.VERDICTS, start="earliest") as reader:
        assert {each.message.round for each in await take(reader, 5)} == set(range(5))


async def test_a_reader_that_seeks_to_the_end_skips_what_was_sent(bus: Bus) -> None:
    async with bus.reader(Topic.VERDICTS, partitions=[0]) as reader:
        for number in range(5):
            await bus.send(verdict(number), partition=0)
        await take(reader, 1)
        await reader.seek_to_end()
        await bus.send(verdict(9), partition=0)
        assert [each.message.round for each in await take(reader, 1)] == [9]


async def test_an_interrupted_wait_for_a_message_loses_none(bus: Bus) -> None:
    async with bus.reader(Topic.VERDICTS, partitions=[0]) as reader:
        read: list[int] = []

        async def read_impatiently() -> None:
            while len(read) < 100:
                try:
                    async with asyncio.timeout(0.002):
                        while True:
                            read.append((await anext(reader)).message.round)
                except TimeoutError:
                    continue

        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            tasks.create_task(read_impatiently())
            for number in range(100):
                await bus.send(verdict(number), partition=0)
        assert read == list(range(100))


async def test_the_trace_and_the_schema_version_travel_beside_the_message(
    bus: Bus, bus_settings: CommonSettings
) -> None:
    trace = TraceContext.new()
    async with bus.reader(Topic.VERDICTS, partitions=[0]) as reader:
        await bus.send(verdict(1), partition=0, trace=trace)
        await bus.send(verdict(2), partition=0)
        first, second = await take(reader, 2)
    assert first.trace == trace
    assert second.trace is None
    assert abs(first.timestamp_ms - time.time() * 1000) < 60_000
    raw = (await raw_records(bus_settings, Topic.VERDICTS))[0]
    assert dict(raw.headers) == {
        "outrider-schema": SCHEMA_VERSION.encode(),
        "traceparent": trace.to_header().encode(),
    }
    assert raw.key == b"session-1"


async def raw_records(settings: CommonSettings, topic: Topic) -> list[ConsumerRecord]:
    consumer = AIOKafkaConsumer(bootstrap_servers=settings.kafka)
    await consumer.start()
    try:
        partition = TopicPartition(settings.topic_prefix + topic, 0)
        consumer.assign([partition])
        await consumer.seek_to_beginning(partition)
        return [each for records in (await consumer.getmany(timeout_ms=5000)).values() for each in records]
    finally:
        await consumer.stop()


# --- topics and clear errors ------------------------------------------------------------------------------------


async def test_any_number_of_processes_may_create_the_topics_at_once(kafka_broker: Broker) -> None:
    settings = settings_for(kafka_broker)

    async def create(number: int) -> dict[Topic, int]:
        async with Bus(settings, client=f"test-{number}") as bus:
            await bus.ensure_topics()
            return {topic: bus.partitions(topic) for topic in Topic}

    counts = await asyncio.gather(*(create(number) for number in range(4)))
    assert counts == [counts[0]] * 4
    assert counts[0][Topic.DRAFTS] == DRAFTS_PARTITIONS
    assert counts[0][Topic.EXITS] == counts[0][Topic.VERDICTS] == 2
    assert counts[0][Topic.DEAD_LETTERS] == 1


async def test_a_topic_that_exists_keeps_its_partitions_whatever_the_settings_say(
    kafka_broker: Broker,
) -> None:
    settings = settings_for(kafka_broker)
    async with Bus(settings, client="test") as bus:
        await bus.ensure_topics([Topic.DRAFTS])
    changed = settings.model_copy(update={"drafts_partitions": 7})
    async with Bus(changed, client="test") as bus:
        assert bus.partitions(Topic.DRAFTS) == DRAFTS_PARTITIONS
        await bus.ensure_topics()
        assert bus.partitions(Topic.DRAFTS) == DRAFTS_PARTITIONS


async def test_a_missing_topic_is_an_error_that_names_it(kafka_broker: Broker) -> None:
    settings = settings_for(kafka_broker)
    async with Bus(settings, client="test") as bus:
        with pytest.raises(BrokerUnavailable, match=f"{settings.topic_prefix}outrider.verdicts"):
            await bus.send(verdict(1), partition=0)
        with pytest.raises(BrokerUnavailable, match=r"ensure_topics"):
            bus.reader(Topic.VERDICTS)


async def test_a_partition_that_does_not_exist_is_refused_with_those_that_do(bus: Bus) -> None:
    with pytest.raises(ValueError, match=r"no partition 2; it has 2, from 0 to 1"):
        await bus.send(verdict(1), partition=2)
    with pytest.raises(ValueError, match=r"no partition -1"):
        bus.post(hint(1), partition=-1)
    with pytest.raises(ValueError, match=r"no partition 99"):
        bus.reader(Topic.VERDICTS, partitions=[0, 99])


async def test_a_message_that_is_too_long_is_refused_and_the_next_one_goes_through(bus: Bus) -> None:
    long = Block(session="s", epoch=1, reply=ROUTE, round=1, base=1, tokens=(1_000_000,) * 400_000)
    with pytest.raises(ProtocolError, match="too long"):
        await bus.send(long, partition=0)
    async with bus.reader(Topic.DRAFTS, partitions=[0]) as reader:
        await bus.send(block(2), partition=0)
        assert [each.message for each in await take(reader, 1)] == [block(2)]


async def test_a_missing_broker_is_an_error_with_the_address_and_the_mend_within_the_deadline() -> None:
    address = f"127.0.0.1:{free_port()}"
    settings = CommonSettings(kafka=address, bus_deadline_s=1.0)
    started = time.monotonic()
    with pytest.raises(BrokerUnavailable) as unavailable:
        await Bus(settings, client="test").start()
    assert time.monotonic() - started < 3.0
    assert address in unavailable.value.message
    assert "OUTRIDER_KAFKA" in unavailable.value.message


async def test_a_bus_that_is_not_started_says_so(kafka_broker: Broker) -> None:
    bus = Bus(settings_for(kafka_broker), client="test")
    with pytest.raises(BrokerUnavailable):
        await bus.send(verdict(1), partition=0)
    with pytest.raises(BrokerUnavailable):
        bus.post(hint(1), partition=0)


# --- dead letters -----------------------------------------------------------------------------------------------


async def send_raw(
    settings: CommonSettings, topic: Topic, value: bytes | None, headers: Sequence[tuple[str, bytes]] = ()
) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=settings.kafka)
    await producer.start()
    try:
        await producer.send_and_wait(
            settings.topic_prefix + topic, value, key=b"key", partition=0, headers=list(headers)
        )
    finally:
        await producer.stop()


UNREADABLE = {
    "garbage": (b"\xff\x00 not json", [], "JSON"),
    "an unknown major version": (encode(block(1)), [("outrider-schema", b"99.0")], "99.0"),
    "a malformed version": (encode(block(1)), [("outrider-schema", b"new")], "MAJOR.MINOR"),
    "another topic's kind": (encode(verdict(1)), [("outrider-schema", b"1.0")], "verdict"),
    "a wrong field": (encode(block(1)).replace(b'"base":1', b'"base":-1'), [], "base"),
    "nothing": (None, [], "JSON"),
}


@pytest.mark.parametrize("case", UNREADABLE)
@pytest.mark.parametrize("grouped", [False, True], ids=["assigned", "grouped"])
async def test_what_cannot_be_read_goes_to_the_dead_letters_and_reading_goes_on(
    bus: Bus, bus_settings: CommonSettings, case: str, grouped: bool
) -> None:
    value, headers, word = UNREADABLE[case]
    reader: Reader[Any] = (
        bus.group_reader(Topic.DRAFTS, group="verifiers", member="verifier-0")
        if grouped
        else bus.reader(Topic.DRAFTS, partitions=[0])
    )
    async with bus.reader(Topic.DEAD_LETTERS, start="earliest") as letters, reader:
        await bus.send(block(0), partition=0)
        await send_raw(bus_settings, Topic.DRAFTS, value, headers)
        await bus.send(block(2), partition=0)
        received = await take(reader, 2)
        assert [each.message for each in received] == [block(0), block(2)]
        for each in received:
            reader.done(each)
        letter = (await take(letters, 1))[0].message
    assert isinstance(letter, DeadLetter)
    assert (letter.source, letter.partition, letter.offset) == (Topic.DRAFTS, 0, 1)
    assert letter.reader == "test"
    assert word in letter.reason
    assert base64.b64decode(letter.payload) == (value or b"")
    assert letter.headers == {key: header.decode() for key, header in headers}
    if grouped:
        async with bus.group_reader(Topic.DRAFTS, group="verifiers", member="verifier-0") as again:
            assert await nothing_more(again), "the dead letter was not counted as done"


# --- groups -----------------------------------------------------------------------------------------------------


async def test_a_group_reads_what_was_sent_before_it_existed(bus: Bus) -> None:
    for number in range(8):
        await bus.send(block(number), partition=number % DRAFTS_PARTITIONS)
    async with bus.group_reader(Topic.DRAFTS, group="verifiers", member="verifier-0") as reader:
        assert reader.assigned == set(range(DRAFTS_PARTITIONS))
        assert {
            each.message.round for each in await take(reader, 8) if isinstance(each.message, Block)
        } == set(range(8))


@pytest.mark.usefixtures("static_members")
async def test_a_restarted_member_gets_its_partitions_back_at_once_and_loses_nothing(bus: Bus) -> None:
    for number in range(10):
        await bus.send(block(number), partition=1)
    async with bus.group_reader(Topic.DRAFTS, group="verifiers", member="verifier-0") as reader:
        for received in (await take(reader, 10))[:6]:
            reader.done(received)
    for number in range(10, 12):
        await bus.send(block(number), partition=1)
    started = time.monotonic()
    async with bus.group_reader(Topic.DRAFTS, group="verifiers", member="verifier-0") as reader:
        assert time.monotonic() - started < 3.0, "the session timeout is 6 s: it must not be waited for"
        assert reader.assigned == set(range(DRAFTS_PARTITIONS))
        assert [each.message for each in await take(reader, 6)] == [block(number) for number in range(6, 12)]
        assert await nothing_more(reader)


async def test_progress_stops_at_the_first_message_that_is_not_done(bus: Bus) -> None:
    for number in range(6):
        await bus.send(block(number), partition=0)
    async with bus.group_reader(Topic.DRAFTS, group="verifiers", member="verifier-0") as reader:
        received = await take(reader, 6)
        for number in (0, 1, 3, 4, 5):
            reader.done(received[number])
    async with bus.group_reader(Topic.DRAFTS, group="verifiers", member="verifier-0") as reader:
        assert [each.message for each in await take(reader, 4)] == [block(number) for number in range(2, 6)]


async def test_two_members_share_the_partitions_and_those_kept_go_on_without_loss_or_repeats(
    bus: Bus,
) -> None:
    moves: list[tuple[str, str, frozenset[int]]] = []
    read: Counter[tuple[int, int]] = Counter()

    def member(name: str) -> Reader[AnyMessage]:
        return bus.group_reader(  # type: ignore[return-value]
            Topic.DRAFTS,
            group="verifiers",
            member=name,
            on_assigned=lambda won: moves.append((name, "won", won)),
            on_revoked=lambda lost: moves.append((name, "lost", lost)),
        )

    async def consume(reader: Reader[AnyMessage]) -> None:
        async for received in reader:
            assert isinstance(received.message, Block)
            read[(received.partition, received.message.round)] += 1
            reader.done(received)

    async with member("verifier-0") as first, asyncio.TaskGroup() as tasks:
        consumers = [tasks.create_task(consume(first))]
        assert moves == [("verifier-0", "won", frozenset(range(DRAFTS_PARTITIONS)))]
        sent = 0

        async def send(count: int) -> int:
            for number in range(sent, sent + count):
                await asyncio.gather(
                    *(bus.send(block(number), partition=partition) for partition in range(DRAFTS_PARTITIONS))
                )
            return sent + count

        sent = await send(20)
        async with member("verifier-1") as second:
            consumers.append(tasks.create_task(consume(second)))
            await until(lambda: first.assigned | second.assigned == set(range(DRAFTS_PARTITIONS)))
            await until(lambda: len(first.assigned) == len(second.assigned) == DRAFTS_PARTITIONS // 2)
            assert not first.assigned & second.assigned
            kept = first.assigned
            sent = await send(20)
            await until(lambda: len(read) == sent * DRAFTS_PARTITIONS)
        for consumer in consumers:
            consumer.cancel()
    assert ("verifier-0", "lost", frozenset(range(DRAFTS_PARTITIONS)) - kept) in moves
    assert all(read[(partition, number)] == 1 for partition in kept for number in range(sent)), (
        "a kept one repeated"
    )


class Member:
    """A process of `bus_member`, and what it has said."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.events: list[dict[str, object]] = []
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.events.append(json.loads(line))

    def said(self, event: str) -> list[dict[str, object]]:
        return [each for each in self.events if each["event"] == event]

    @property
    def rounds(self) -> list[object]:
        return [each["round"] for each in self.said("read")]

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        await self._reading


@asynccontextmanager
async def member_process(settings: CommonSettings, name: str, *arguments: str) -> AsyncIterator[Member]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.integration.bus_member",
        name,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "OUTRIDER_KAFKA": settings.kafka, "OUTRIDER_TOPIC_PREFIX": settings.topic_prefix},
    )
    member = Member(process)
    try:
        await until(lambda: bool(member.said("started")) or process.returncode is not None, 30)
        yield member
    finally:
        await member.kill()


async def test_a_member_killed_before_done_finds_the_message_again(
    bus: Bus, bus_settings: CommonSettings
) -> None:
    async with member_process(bus_settings, "verifier-0", "--done-below", "7") as doomed:
        for number in range(10):
            await bus.send(block(number), partition=2)
        await until(lambda: len(doomed.rounds) == 10)
        # Some of those done may be repeated, as commits are not made for each; what is not done must be.
        await doomed.kill()
    async with member_process(bus_settings, "verifier-0") as heir:
        await until(lambda: {7, 8, 9} <= set(heir.rounds))
        assert heir.rounds == sorted(heir.rounds, key=str)


@pytest.mark.usefixtures("static_members")
async def test_another_member_takes_over_from_a_killed_one_after_the_session_timeout(
    bus: Bus, bus_settings: CommonSettings
) -> None:
    timeout_s = 3.0
    async with (
        member_process(bus_settings, "verifier-0", "--session-timeout-s", str(timeout_s)) as doomed,
        member_process(bus_settings, "verifier-1", "--session-timeout-s", str(timeout_s)) as heir,
    ):
        await until(lambda: bool(doomed.said("revoked")))
        for number in range(20):
            await bus.send(block(number), partition=number % DRAFTS_PARTITIONS)
        await until(lambda: len(doomed.rounds) + len(heir.rounds) == 20)
        killed = time.time()
        await doomed.kill()
        for number in range(20, 40):
            await bus.send(block(number), partition=number % DRAFTS_PARTITIONS)
        await until(lambda: {*range(20, 40)} <= {*heir.rounds}, within_s=30)
        taken_over = max(float(str(each["at"])) for each in heir.said("assigned")) - killed
        assert timeout_s * 0.5 < taken_over < timeout_s + 3.0
        assert {*range(40)} <= {*doomed.rounds, *heir.rounds}


@pytest.mark.usefixtures("static_members")
async def test_of_two_processes_with_one_name_the_earlier_stops_with_a_clear_error(
    bus: Bus, bus_settings: CommonSettings
) -> None:
    async with (
        bus.group_reader(
            Topic.DRAFTS, group="verifiers", member="verifier-0", session_timeout_s=3.0
        ) as earlier,
        member_process(bus_settings, "verifier-0") as later,
    ):
        with pytest.raises(MemberNameTaken, match="'verifier-0'"):
            await take(earlier, 1, within_s=30)
        assert not earlier.assigned
        await bus.send(block(1), partition=0)
        await until(lambda: later.rounds == [1])
        assert not later.said("failed")


# --- bounds -----------------------------------------------------------------------------------------------------


async def test_a_reader_that_is_not_read_holds_no_more_than_its_bound(kafka_broker: Broker) -> None:
    settings = settings_for(kafka_broker, bus_queue=10)
    async with Bus(settings, client="test") as bus:
        await bus.ensure_topics()
        async with bus.group_reader(Topic.DRAFTS, group="verifiers", member="verifier-0") as reader:
            for number in range(50):
                await bus.send(block(number), partition=number % DRAFTS_PARTITIONS)
            held = await take(reader, 10)
            assert await nothing_more(reader), "more messages were handed out than may be open at a time"
            for received in held:
                reader.done(received)
            for _ in range(4):
                held = await take(reader, 10)
                for received in held:
                    reader.done(received)


async def test_hints_beyond_the_bound_are_dropped_and_counted(bus_settings: CommonSettings, bus: Bus) -> None:
    registry = CollectorRegistry()
    async with (
        Bus(bus_settings, client="test", registry=registry) as flooded,
        bus.reader(Topic.EXITS, partitions=[0], start="earliest") as reader,
    ):
        # A hint is not sent again, so that the first ones of a new topic may be lost: until it has a leader.
        while flooded.post(hint(0), partition=0) and await nothing_more(reader):
            pass
        await until(lambda: not flooded.hints_under_way)
        posted = [flooded.post(hint(number), partition=0) for number in range(MAX_HINTS_IN_FLIGHT + 50)]
        assert posted.count(True) == MAX_HINTS_IN_FLIGHT
        assert posted.index(False) == MAX_HINTS_IN_FLIGHT
        received = await take(reader, MAX_HINTS_IN_FLIGHT)
        assert [each.message.round for each in received] == list(range(MAX_HINTS_IN_FLIGHT))
    assert registry.get_sample_value("outrider_bus_hints_dropped_total", {"reason": "full"}) == 50


async def test_a_verdict_does_not_queue_behind_hints(
    bus: Bus, bus_settings: CommonSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    exits_topic = f"{bus_settings.topic_prefix}{Topic.EXITS}".encode()
    ways: set[Connection] = set()
    stalled = False
    held: list[Callable[[], None]] = []
    request = Connection.request

    def stalling(self: Connection, api: tuple[int, int], body: bytes, on_reply: OnReply) -> None:
        if api == PRODUCE and exits_topic in body:
            ways.add(self)
        if stalled and self in ways:
            held.append(partial(request, self, api, body, on_reply))
        else:
            request(self, api, body, on_reply)

    monkeypatch.setattr(Connection, "request", stalling)
    async with (
        bus.reader(Topic.EXITS, partitions=[0]) as exits,
        bus.reader(Topic.VERDICTS, partitions=[0]) as verdicts,
    ):
        while bus.post(hint(0), partition=0) and await nothing_more(exits):
            pass
        await until(lambda: not bus.hints_under_way)
        stalled = True
        while bus.post(hint(1), partition=0):
            pass
        for number in range(20):
            await bus.send(verdict(number), partition=0)
        assert [each.message.round for each in await take(verdicts, 20)] == list(range(20))
        stalled = False
        assert held
        for go_on in held:
            go_on()
        assert len(await take(exits, MAX_HINTS_IN_FLIGHT)) == MAX_HINTS_IN_FLIGHT


# --- stopping ---------------------------------------------------------------------------------------------------


async def test_stopping_sends_what_is_under_way(bus: Bus, bus_settings: CommonSettings) -> None:
    async with Bus(bus_settings, client="leaving") as leaving:
        sends = [asyncio.create_task(leaving.send(verdict(number), partition=0)) for number in range(100)]
        posts = [leaving.post(hint(number), partition=0) for number in range(100)]
        await asyncio.sleep(0)
    assert all(posts)
    await asyncio.gather(*sends)
    async with (
        bus.reader(Topic.VERDICTS, partitions=[0], start="earliest") as verdicts,
        bus.reader(Topic.EXITS, partitions=[0], start="earliest") as exits,
    ):
        assert [each.message.round for each in await take(verdicts, 100)] == list(range(100))
        assert [each.message.round for each in await take(exits, 100)] == list(range(100))


async def test_stopping_a_reader_ends_its_iteration(bus: Bus) -> None:
    reader = bus.reader(Topic.VERDICTS)
    await reader.start()
    reading = asyncio.create_task(anext(reader, None))
    await asyncio.sleep(0.05)
    await reader.stop()
    async with asyncio.timeout(5):
        assert await reading is None
    assert [each async for each in reader] == []


async def test_a_stopped_bus_leaves_no_task_behind(bus_settings: CommonSettings) -> None:
    before = asyncio.all_tasks()
    async with Bus(bus_settings, client="test") as bus:
        await bus.ensure_topics()
        forgotten = bus.reader(Topic.EXITS)
        await forgotten.start()
        async with bus.reader(Topic.VERDICTS), bus.group_reader(Topic.DRAFTS, group="verifiers", member="v"):
            await bus.send(verdict(1), partition=0)
    await until(lambda: asyncio.all_tasks() <= before)


# --- the broker's death -----------------------------------------------------------------------------------------


async def test_a_broker_killed_in_mid_stream_loses_and_repeats_nothing_that_was_acknowledged(
    own_kafka: Broker,
) -> None:
    if own_kafka.flavor is KafkaFlavor.TANSU:
        pytest.skip("Tansu forgets everything when it ends")
    acknowledged: list[int] = []
    read: list[int] = []
    group_read: list[int] = []
    stop = asyncio.Event()

    async def keep_sending(bus: Bus) -> None:
        number = 0
        while not stop.is_set():
            await asyncio.gather(bus.send(verdict(number), partition=0), bus.send(block(number), partition=0))
            acknowledged.append(number)
            number += 1

    async def keep_reading(reader: Reader[Any], into: list[int]) -> None:
        async for received in reader:
            into.append(received.message.round)
            reader.done(received)

    async with Bus(settings_for(own_kafka), client="test") as bus:
        await bus.ensure_topics()
        async with (
            bus.reader(Topic.VERDICTS, partitions=[0]) as verdicts,
            bus.group_reader(Topic.DRAFTS, group="verifiers", member="verifier-0") as drafts,
            asyncio.TaskGroup() as tasks,
        ):
            readers = [
                tasks.create_task(keep_reading(verdicts, read)),
                tasks.create_task(keep_reading(drafts, group_read)),
            ]
            sender = tasks.create_task(keep_sending(bus))
            await until(lambda: len(read) > 200)
            own_kafka.kill()
            died = time.monotonic()
            before = len(acknowledged)
            await asyncio.to_thread(own_kafka.start)
            await until(lambda: len(acknowledged) > before + 200, 30)
            print(f"next acknowledgement and 200 more {time.monotonic() - died:.1f} s after the kill")
            stop.set()
            await sender
            await until(lambda: len(read) >= len(acknowledged) and len(group_read) >= len(acknowledged), 30)
            for each in readers:
                each.cancel()
    assert read == acknowledged
    assert sorted(set(group_read)) == acknowledged
    assert group_read == acknowledged


async def test_sending_while_the_broker_is_away_fails_clearly_at_the_deadline(own_kafka: Broker) -> None:
    async with Bus(settings_for(own_kafka, bus_deadline_s=2.0), client="test") as bus:
        await bus.ensure_topics()
        await bus.send(verdict(0), partition=0)
        own_kafka.kill()
        started = time.monotonic()
        with pytest.raises(BrokerUnavailable, match=own_kafka.address):
            await bus.send(verdict(1), partition=0)
        assert time.monotonic() - started < 4.0
        assert bus.post(hint(1), partition=0)
        started = time.monotonic()
    assert time.monotonic() - started < 15.0, "stopping waits for the broker without end"


async def test_a_broker_that_hangs_is_given_up_at_the_deadline_and_used_again_when_it_goes_on(
    own_kafka: Broker,
) -> None:
    async with Bus(settings_for(own_kafka, bus_deadline_s=3.0), client="test") as bus:
        await bus.ensure_topics()
        async with bus.reader(Topic.VERDICTS, partitions=[0]) as reader:
            await bus.send(verdict(0), partition=0)
            own_kafka.kill(signal.SIGSTOP)
            try:
                started = time.monotonic()
                with pytest.raises(BrokerUnavailable):
                    await bus.send(verdict(1), partition=0)
                assert time.monotonic() - started < 5.0
            finally:
                own_kafka.kill(signal.SIGCONT)
            deadline = time.monotonic() + 30
            while True:
                try:
                    await bus.send(verdict(2), partition=0)
                    break
                except BrokerUnavailable:
                    assert time.monotonic() < deadline
            received = [(await take(reader, 1))[0].message.round]
            while received[-1] != 2:
                received.append((await take(reader, 1))[0].message.round)
            assert received in ([0, 2], [0, 1, 2]), (
                "what was not acknowledged may arrive, but once and in its place"
            )
