"""The fetcher against a model broker: one open fetch, nothing skipped, nothing twice, whatever goes wrong."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from io import BytesIO

import pytest
from aiokafka.protocol.fetch import FetchRequest_v4, FetchResponse_v4

from shared.kafka import fetcher as fetcher_module
from shared.kafka.cluster import Cluster
from shared.kafka.fetcher import Fetcher
from shared.kafka.wire import NO_PRODUCER, Connection, OnReply, Outgoing, Record, encode_batch

TOPIC = "topic"
OFFSET_OUT_OF_RANGE, NOT_LEADER = 1, 6


class ModelConnection:
    """In place of a socket: a fetch stays open until the model broker answers it."""

    def __init__(self, broker: ModelBroker) -> None:
        self._broker = broker
        self.closed = False

    def request(self, api: tuple[int, int], body: bytes, on_reply: OnReply) -> None:
        [(_, partitions)] = FetchRequest_v4.decode(BytesIO(body)).topics
        self._broker.asked.append({partition: offset for partition, offset, _ in partitions})
        self._broker.open.append(on_reply)

    def close(self) -> None:
        self.closed = True


class ModelBroker(Cluster):
    """One broker, whose answers the test gives."""

    def __init__(self) -> None:
        super().__init__("model:9092", client="test", timeout_s=1.0)
        self.asked: list[dict[int, int]] = []
        self.open: deque[OnReply] = deque()
        self.connections: list[ModelConnection] = []
        self.leaderless: set[int] = set()

    def leader(self, name: str, partition: int) -> int | None:
        return None if partition in self.leaderless else 1

    async def refresh(self) -> None:
        await asyncio.sleep(0)

    async def connect(self, node: int, *, purpose: str, timeout_s: float) -> Connection:
        await asyncio.sleep(0)
        self.connections.append(ModelConnection(self))
        return self.connections[-1]  # type: ignore[return-value]

    def answer(self, *answers: tuple[int, int, bytes]) -> None:
        """Answer the fetch that is open: (partition, error, batches)."""
        nothing_aborted: list[tuple[int, int]] = []
        parts = [(partition, error, 0, 0, nothing_aborted, batches) for partition, error, batches in answers]
        self.open.popleft()(FetchResponse_v4(0, [(TOPIC, parts)]).encode())

    def hang_up(self) -> None:
        self.connections[-1].close()
        while self.open:
            self.open.popleft()(None)


class Reading:
    """A fetcher, what it has brought, and how much room there is."""

    def __init__(self, broker: ModelBroker, beginnings: dict[int, int] | None = None) -> None:
        self.room = True
        self.records: list[tuple[int, int]] = []
        self.sought: list[int] = []
        self._beginnings = beginnings or {}
        self.fetcher = Fetcher(
            broker,
            TOPIC,
            purpose="test",
            max_wait_ms=100,
            partition_bytes=1000,
            timeout_s=1.0,
            find_position=self._find_position,
            on_records=self._on_records,
            has_room=lambda: self.room,
        )

    async def _find_position(self, partition: int) -> int:
        self.sought.append(partition)
        await asyncio.sleep(0)
        return self._beginnings.get(partition, 0)

    def _on_records(self, partition: int, records: list[Record]) -> None:
        self.records.extend((partition, record.offset) for record in records)


def batch(count: int) -> bytes:
    record = Outgoing(value=b"value", key=None, headers=[], timestamp_ms=0)
    return encode_batch(
        [record] * count,
        producer_id=NO_PRODUCER,
        producer_epoch=NO_PRODUCER,
        sequence=NO_PRODUCER,
        size_limit=1 << 20,
    )[0]


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetcher_module, "RETRY_S", 0.001)


@pytest.fixture
def broker() -> ModelBroker:
    return ModelBroker()


async def test_partitions_without_a_position_are_looked_up_and_asked_for_together(
    broker: ModelBroker,
) -> None:
    reading = Reading(broker, {0: 5, 1: 7})
    reading.fetcher.read({0: None, 1: None, 2: 9})
    await reading.fetcher.positioned()
    assert reading.fetcher.positions == {0: 5, 1: 7, 2: 9}
    await until(lambda: bool(broker.open))
    assert broker.asked == [{0: 5, 1: 7, 2: 9}]
    assert sorted(reading.sought) == [0, 1]


async def test_one_fetch_is_open_and_the_next_goes_on_where_it_ended(broker: ModelBroker) -> None:
    reading = Reading(broker)
    reading.fetcher.read({0: 0, 1: 0})
    await until(lambda: bool(broker.open))
    broker.answer((0, 0, batch(3)), (1, 0, b""))
    assert reading.records == [(0, 0), (0, 1), (0, 2)], "handed over within the callback"
    await until(lambda: bool(broker.open))
    assert len(broker.open) == 1
    assert broker.asked[1] == {0: 3, 1: 0}


async def test_nothing_is_asked_for_without_room(broker: ModelBroker) -> None:
    reading = Reading(broker)
    reading.fetcher.read({0: 0})
    await until(lambda: bool(broker.open))
    reading.room = False
    broker.answer((0, 0, batch(1)))
    for _ in range(20):
        await asyncio.sleep(0)
    reading.fetcher.room_made()
    assert not broker.open
    reading.room = True
    reading.fetcher.room_made()
    assert len(broker.open) == 1


async def test_a_lost_connection_is_replaced_and_nothing_is_skipped(broker: ModelBroker) -> None:
    reading = Reading(broker)
    reading.fetcher.read({0: 0})
    await until(lambda: bool(broker.open))
    broker.answer((0, 0, batch(2)))
    await until(lambda: bool(broker.open))
    broker.hang_up()
    await until(lambda: bool(broker.open))
    assert len(broker.connections) == 2
    assert broker.asked[-1] == {0: 2}


async def test_a_position_that_has_left_the_log_is_looked_up_anew(broker: ModelBroker) -> None:
    reading = Reading(broker, {0: 50})
    reading.fetcher.read({0: 3})
    await until(lambda: bool(broker.open))
    broker.answer((0, OFFSET_OUT_OF_RANGE, b""))
    await until(lambda: broker.asked[-1:] == [{0: 50}])
    assert reading.sought == [0]


async def test_a_partition_in_trouble_rests_while_the_others_go_on(broker: ModelBroker) -> None:
    reading = Reading(broker)
    reading.fetcher.read({0: 0, 1: 0})
    await until(lambda: bool(broker.open))
    broker.leaderless.add(0)
    broker.answer((0, NOT_LEADER, b""), (1, 0, batch(1)))
    await until(lambda: bool(broker.open))
    assert broker.asked[-1] == {1: 1}
    broker.leaderless.clear()

    def asked_for_both() -> bool:
        if broker.asked[-1] == {0: 0, 1: 1}:
            return True
        if broker.open:
            broker.answer()  # as a broker does that has waited long enough
        return False

    await until(asked_for_both)


async def test_an_error_is_not_answered_with_a_hot_loop(
    broker: ModelBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetcher_module, "RETRY_S", 60.0)
    reading = Reading(broker)
    reading.fetcher.read({0: 0})
    await until(lambda: bool(broker.open))
    broker.answer((0, NOT_LEADER, b""))
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(broker.asked) == 1
    await reading.fetcher.stop()


async def test_what_arrives_for_a_partition_taken_away_or_given_anew_is_dropped(broker: ModelBroker) -> None:
    reading = Reading(broker)
    reading.fetcher.read({0: 0, 1: 0, 2: 0})
    await until(lambda: bool(broker.open))
    reading.fetcher.read({1: 0, 2: 5})
    broker.answer((0, 0, batch(1)), (1, 0, batch(1)), (2, 0, batch(1)))
    assert reading.records == [(1, 0)]
    await until(lambda: bool(broker.open))
    assert broker.asked[-1] == {1: 1, 2: 5}


async def test_a_stopped_fetcher_asks_for_nothing(broker: ModelBroker) -> None:
    reading = Reading(broker)
    reading.fetcher.read({0: 0})
    await until(lambda: bool(broker.open))
    await reading.fetcher.stop()
    assert all(connection.closed for connection in broker.connections)
    broker.answer((0, 0, batch(1)))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not broker.open
    assert reading.records == []
