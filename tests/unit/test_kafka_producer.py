"""The producer against a broker that follows Kafka's rules for sequence numbers and fails wherever it may."""

from __future__ import annotations

import asyncio
import random
import struct
from collections import deque
from collections.abc import Mapping
from io import BytesIO

import pytest
from aiokafka.errors import KafkaConnectionError, KafkaError, MessageSizeTooLargeError
from aiokafka.protocol.produce import ProduceRequest_v7, ProduceResponse_v7
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.kafka import producer as producer_module
from shared.kafka.cluster import Cluster
from shared.kafka.producer import Producer
from shared.kafka.wire import Connection, Fetched, OnReply

NOT_LEADER, MESSAGE_TOO_LARGE, OUT_OF_ORDER, DUPLICATE, UNKNOWN_PRODUCER = 6, 10, 45, 46, 59
TOPIC = "topic"


class ModelConnection:
    """In place of a socket: hands requests to the model broker in the next turn of the loop."""

    def __init__(self, broker: ModelBroker) -> None:
        self._broker = broker
        self._open: deque[OnReply] = deque()
        self.closed = False

    def request(self, api: tuple[int, int], body: bytes, on_reply: OnReply) -> None:
        self._open.append(on_reply)
        asyncio.get_running_loop().call_soon(self._serve, body)

    def _serve(self, body: bytes) -> None:
        if not self.closed:
            reply = self._broker.serve(body)
            if reply is None:
                self.close()
            else:
                self._open.popleft()(reply)

    def close(self) -> None:
        self.closed = True
        while self._open:
            self._open.popleft()(None)


class ModelBroker(Cluster):
    """One broker that knows idempotent producers as Kafka does, and goes wrong as its script says.

    Script entries: "ok"; an error code, answered for a request's first partition, to which nothing is written; "lost
    before" and "lost after" the write, after both of which the connection is gone; "forget", after which no producer is
    known. An empty script is "ok" for ever.
    """

    def __init__(self, script: list[str | int]) -> None:
        super().__init__("model:9092", client="test", timeout_s=1.0)
        self.script = deque(script)
        self.log: dict[int, list[bytes]] = {}
        self.known: dict[tuple[int, int], int] = {}
        self.identities = 0
        self.reachable = True
        self.requests: list[bytes] = []

    def leader(self, name: str, partition: int) -> int | None:
        return 1

    async def refresh(self) -> None:
        await asyncio.sleep(0)

    async def connect(self, node: int, *, purpose: str, timeout_s: float) -> Connection:
        await asyncio.sleep(0)
        if not self.reachable:
            raise ConnectionRefusedError("the model broker is away")
        return ModelConnection(self)  # type: ignore[return-value]

    async def new_producer_id(self) -> tuple[int, int]:
        await asyncio.sleep(0)
        self.identities += 1
        return self.identities, 0

    def serve(self, body: bytes) -> bytes | None:
        self.requests.append(body)
        fate = self.script.popleft() if self.script else "ok"
        [(_, batches)] = ProduceRequest_v7.decode(BytesIO(body)).topics
        if fate == "lost before":
            return None
        if fate == "forget":
            self.known.clear()
            return answer({partition: UNKNOWN_PRODUCER for partition, _ in batches})
        refused = {batches[0][0]: fate} if isinstance(fate, int) else {}
        errors = {
            partition: refused.get(partition) or self._append(partition, batch)
            for partition, batch in batches
        }
        return None if fate == "lost after" else answer(errors)

    def _append(self, partition: int, batch: bytes) -> int:
        producer_id, _, sequence = struct.unpack_from(">qhi", batch, 43)
        records = [record.value or b"" for record in Fetched(partition, 0, batch).read(0)[0]]
        if producer_id >= 0:
            expected = self.known.get((producer_id, partition), 0)
            if sequence + len(records) == expected:
                return DUPLICATE
            if sequence != expected:
                return OUT_OF_ORDER
            self.known[producer_id, partition] = sequence + len(records)
        self.log.setdefault(partition, []).extend(records)
        return 0


def answer(errors: Mapping[int, int]) -> bytes:
    told = [(partition, error, 0, -1, 0) for partition, error in errors.items()]
    encoded: bytes = ProduceResponse_v7([(TOPIC, told)], 0).encode()
    return encoded


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producer_module, "RETRY_S", 0.001)


def producer_for(broker: ModelBroker, *, idempotent: bool = True, persistent: bool = True) -> Producer:
    return Producer(
        broker, purpose="test", acks=-1, idempotent=idempotent, persistent=persistent, timeout_s=1.0
    )


def send(producer: Producer, number: int, partition: int = 0) -> asyncio.Future[None]:
    return producer.send(TOPIC, partition, b"%d" % number, key=b"key", headers=[])


async def settled(*futures: asyncio.Future[None]) -> list[BaseException | None]:
    async with asyncio.timeout(10):
        return list(await asyncio.gather(*futures, return_exceptions=True))


@given(
    st.lists(st.sampled_from(["ok", "lost before", "lost after", NOT_LEADER, 7, 19]), max_size=30),
    st.integers(0, 2**32),
)
@settings(max_examples=80, deadline=None)
def test_whatever_is_lost_every_record_arrives_once_and_in_order(script: list[str | int], seed: int) -> None:
    async def run() -> None:
        dice = random.Random(seed)
        broker = ModelBroker(list(script))
        producer = producer_for(broker)
        futures = []
        for number in range(60):
            futures.append(send(producer, number, partition=number % 3))
            if dice.random() < 0.3:
                await asyncio.sleep(0.001 * dice.random())
        assert await settled(*futures) == [None] * 60
        for partition in range(3):
            assert broker.log[partition] == [b"%d" % number for number in range(partition, 60, 3)]
        assert await producer.stop(1.0)

    asyncio.run(run())


async def test_records_of_one_turn_leave_at_its_end_and_those_that_come_meanwhile_together() -> None:
    broker = ModelBroker([])
    producer = producer_for(broker)
    await send(producer, 0)
    broker.requests.clear()
    first = [send(producer, number) for number in range(1, 4)]
    await asyncio.sleep(0)
    rest = [send(producer, number) for number in range(4, 10)]
    assert await settled(*first, *rest) == [None] * 9
    assert len(broker.requests) == 2
    assert broker.log[0] == [b"%d" % number for number in range(10)]


async def test_partitions_share_a_request_and_an_error_of_one_is_not_the_others() -> None:
    broker = ModelBroker([])
    producer = producer_for(broker)
    await settled(send(producer, 0, 0), send(producer, 0, 1), send(producer, 0, 2))
    broker.requests.clear()
    broker.script.append(MESSAGE_TOO_LARGE)
    refused, *taken = await settled(*(send(producer, 1, partition) for partition in range(3)))
    assert len(broker.requests) == 1
    assert isinstance(refused, MessageSizeTooLargeError) and taken == [None, None]
    assert (broker.log[0], broker.log[1]) == ([b"0"], [b"0", b"1"])


async def test_records_wait_for_one_request_at_most() -> None:
    broker = ModelBroker([])
    producer = producer_for(broker)
    await settled(send(producer, 0, 0), send(producer, 0, 1))
    broker.requests.clear()
    futures = [send(producer, 1, 0)]
    await asyncio.sleep(0)
    futures += [send(producer, number, partition) for number in (2, 3) for partition in (0, 1)]
    assert await settled(*futures) == [None] * 5
    assert len(broker.requests) == 2
    assert broker.log == {0: [b"0", b"1", b"2", b"3"], 1: [b"0", b"2", b"3"]}


async def test_a_producer_that_the_broker_has_forgotten_begins_anew_under_another_identity() -> None:
    broker = ModelBroker(["ok", "forget"])
    producer = producer_for(broker)
    assert await settled(send(producer, 0)) == [None]
    assert await settled(send(producer, 1), send(producer, 2)) == [None, None]
    assert broker.identities == 2
    assert broker.log[0] == [b"0", b"1", b"2"]


async def test_a_record_that_the_broker_refuses_fails_alone_and_leaves_no_gap() -> None:
    broker = ModelBroker(["ok", MESSAGE_TOO_LARGE])
    producer = producer_for(broker)
    assert await settled(send(producer, 0)) == [None]
    [refused] = await settled(send(producer, 1))
    assert isinstance(refused, MessageSizeTooLargeError)
    assert await settled(send(producer, 2)) == [None]
    assert broker.log[0] == [b"0", b"2"]
    assert broker.identities == 1


async def test_a_record_withdrawn_before_it_left_is_not_sent() -> None:
    broker = ModelBroker([])
    producer = producer_for(broker)
    await send(producer, 0)
    under_way, withdrawn, kept = (send(producer, number) for number in (1, 2, 3))
    withdrawn.cancel()
    assert await settled(under_way, kept) == [None, None]
    assert broker.log[0] == [b"0", b"1", b"3"]


async def test_a_batch_that_nobody_waits_for_any_more_is_given_up_without_confusing_the_next() -> None:
    broker = ModelBroker(["ok", "lost after"])
    producer = producer_for(broker)
    await send(producer, 0)
    broker.reachable = True
    abandoned = send(producer, 1)
    await asyncio.sleep(0)
    broker.reachable = False
    await asyncio.sleep(0.01)
    abandoned.cancel()
    await asyncio.sleep(0.02)
    broker.reachable = True
    assert await settled(send(producer, 2)) == [None]
    assert broker.log[0] == [b"0", b"1", b"2"]


async def test_an_impersistent_producer_gives_records_up_with_their_connection() -> None:
    broker = ModelBroker(["ok", "lost before"])
    producer = producer_for(broker, idempotent=False, persistent=False)
    assert await settled(send(producer, 0)) == [None]
    first = send(producer, 1)
    await asyncio.sleep(0)
    second = send(producer, 2)
    [lost, later] = await settled(first, second)
    assert isinstance(lost, KafkaConnectionError)
    assert later is None
    broker.reachable = False
    for way in producer._ways.values():
        way.connection.close()
    [unreachable] = await settled(send(producer, 3))
    assert isinstance(unreachable, KafkaError)
    broker.reachable = True
    assert await settled(send(producer, 4)) == [None]
    assert broker.log[0] == [b"0", b"2", b"4"]


async def test_stopping_waits_for_what_is_under_way_and_says_when_it_did_not_arrive() -> None:
    broker = ModelBroker([])
    producer = producer_for(broker)
    futures = [send(producer, number) for number in range(10)]
    assert await producer.stop(5.0)
    assert await settled(*futures) == [None] * 10

    broker.reachable = False
    stuck = producer_for(broker)
    future = send(stuck, 10)
    assert not await stuck.stop(0.05)
    [error] = await settled(future)
    assert isinstance(error, KafkaConnectionError)
