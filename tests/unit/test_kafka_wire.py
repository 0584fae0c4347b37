"""Our bytes are Kafka's: compared with aiokafka's own encoding, and sent to a server that misbehaves."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from io import BytesIO

import pytest
from aiokafka.protocol.fetch import FetchRequest_v4, FetchResponse_v4
from aiokafka.protocol.produce import ProduceRequest_v7, ProduceResponse_v7
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ProtocolError
from shared.kafka.wire import (
    FETCH,
    NO_PRODUCER,
    PRODUCE,
    Connection,
    Fetched,
    Outgoing,
    Produced,
    decode_fetch,
    decode_produce,
    encode_batch,
    encode_fetch,
    encode_produce,
)

names = st.text("abcdefghijklmnopqrstuvwxyz.-", min_size=1, max_size=40)
partitions = st.integers(0, 2**31 - 1)
offsets = st.integers(0, 2**63 - 1)
outgoing = st.builds(
    Outgoing,
    value=st.binary(max_size=200),
    key=st.none() | st.binary(max_size=20),
    headers=st.lists(st.tuples(st.text(max_size=10), st.binary(max_size=20)), max_size=3),
    timestamp_ms=st.integers(0, 2**42),
)
RECORD = Outgoing(value=b"value", key=b"key", headers=[("name", b"header")], timestamp_ms=1_700_000_000_000)


def batch_of(*records: Outgoing, sequence: int = 0, size_limit: int = 1 << 20) -> tuple[bytes, int]:
    return encode_batch(
        iter(records), producer_id=7, producer_epoch=1, sequence=sequence, size_limit=size_limit
    )


# --- requests and replies ---------------------------------------------------------------------------------------


@given(
    st.dictionaries(
        names, st.lists(st.tuples(partitions, st.binary(max_size=200)), min_size=1, max_size=3), max_size=3
    ),
    st.sampled_from([-1, 0, 1]),
    st.integers(0, 60_000),
)
def test_a_produce_request_is_kafkas(
    batches: dict[str, list[tuple[int, bytes]]], acks: int, timeout_ms: int
) -> None:
    theirs = ProduceRequest_v7(None, acks, timeout_ms, list(batches.items())).encode()
    assert encode_produce(batches, acks=acks, timeout_ms=timeout_ms) == theirs
    assert PRODUCE == (ProduceRequest_v7.API_KEY, ProduceRequest_v7.API_VERSION)


@given(
    names, st.lists(st.tuples(partitions, offsets), max_size=12), st.integers(0, 500), st.integers(1, 2**30)
)
def test_a_fetch_request_is_kafkas(
    name: str, positions: list[tuple[int, int]], max_wait_ms: int, max_bytes: int
) -> None:
    asked = [(partition, offset, 1000) for partition, offset in positions]
    theirs = FetchRequest_v4(-1, max_wait_ms, 1, max_bytes, 0, [(name, asked)]).encode()
    ours = encode_fetch(name, positions, max_wait_ms=max_wait_ms, max_bytes=max_bytes, partition_bytes=1000)
    assert ours == theirs
    assert FETCH == (FetchRequest_v4.API_KEY, FetchRequest_v4.API_VERSION)


@given(
    st.dictionaries(
        names,
        st.dictionaries(partitions, st.tuples(st.integers(-1, 100), offsets), min_size=1, max_size=3),
        max_size=3,
    )
)
def test_the_answer_to_a_produce_request_is_read(answers: dict[str, dict[int, tuple[int, int]]]) -> None:
    told = [
        (name, [(partition, error, offset, -1, 0) for partition, (error, offset) in each.items()])
        for name, each in answers.items()
    ]
    assert decode_produce(ProduceResponse_v7(told, 0).encode()) == {
        (name, partition): Produced(error, offset)
        for name, each in answers.items()
        for partition, (error, offset) in each.items()
    }


@given(
    names,
    st.lists(
        st.tuples(
            partitions,
            st.integers(-1, 100),
            st.lists(st.tuples(offsets, offsets), max_size=3),
            st.binary(max_size=99),
        ),
        max_size=5,
    ),
)
def test_the_answer_to_a_fetch_request_is_read(
    name: str, answers: list[tuple[int, int, list[tuple[int, int]], bytes]]
) -> None:
    theirs = [(partition, error, 9, 9, aborted, batches) for partition, error, aborted, batches in answers]
    reply = FetchResponse_v4(0, [(name, theirs)]).encode()
    fetched = decode_fetch(reply)
    assert fetched == [Fetched(partition, error, batches) for partition, error, _, batches in answers]
    assert FetchResponse_v4.decode(BytesIO(reply)).topics[0][0] == name


@given(st.binary(max_size=60))
def test_what_is_no_answer_is_refused(reply: bytes) -> None:
    for decode in (decode_produce, decode_fetch):
        try:
            decode(reply)
        except ProtocolError as error:
            assert "not an answer" in error.message


# --- batches ----------------------------------------------------------------------------------------------------


@given(st.lists(outgoing, min_size=1, max_size=10))
@settings(deadline=None)
def test_records_survive_a_batch(records: list[Outgoing]) -> None:
    encoded, count = batch_of(*records)
    assert count == len(records)
    found, after = Fetched(0, 0, encoded).read(0)
    assert after == len(records)
    assert [
        Outgoing(record.value or b"", record.key, list(record.headers), record.timestamp)  # type: ignore[attr-defined, arg-type]
        for record in found
    ] == records


def test_a_batch_takes_what_fits_and_at_least_one_record() -> None:
    long = Outgoing(value=b"x" * 900, key=None, headers=[], timestamp_ms=0)
    assert batch_of(long, long, long, size_limit=2000)[1] == 2
    assert batch_of(long, long, size_limit=100)[1] == 1


def test_a_batch_carries_the_producers_identity_and_sequence() -> None:
    encoded, _ = batch_of(RECORD, RECORD, sequence=41)
    assert struct.unpack_from(">qhi", encoded, 43) == (7, 1, 41)
    anonymous, _ = encode_batch(
        [RECORD], producer_id=NO_PRODUCER, producer_epoch=NO_PRODUCER, sequence=NO_PRODUCER, size_limit=1000
    )
    assert struct.unpack_from(">qhi", anonymous, 43) == (-1, -1, -1)


def test_reading_goes_on_where_it_was_within_a_batch() -> None:
    encoded, _ = batch_of(RECORD, RECORD, RECORD)
    records, after = Fetched(0, 0, encoded).read(2)
    assert [record.offset for record in records] == [2]
    assert after == 3


def test_a_batch_cut_off_at_the_end_is_left_for_the_next_fetch() -> None:
    encoded, _ = batch_of(RECORD)
    assert Fetched(0, 0, encoded[:-5]).read(0) == ([], 0)


def test_a_corrupt_batch_is_refused() -> None:
    encoded, _ = batch_of(RECORD)
    with pytest.raises(ProtocolError, match="checksum"):
        Fetched(0, 0, encoded[:-1] + bytes([encoded[-1] ^ 1])).read(0)


# --- connections ------------------------------------------------------------------------------------------------

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def connected(handler: Handler, timeout_s: float = 5.0) -> AsyncIterator[Connection]:
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    connection = await Connection.open("127.0.0.1", port, client="test", timeout_s=timeout_s)
    try:
        yield connection
    finally:
        connection.close()
        server.close()


async def read_request(reader: asyncio.StreamReader) -> tuple[tuple[int, int], int, bytes]:
    (size,) = struct.unpack(">i", await reader.readexactly(4))
    data = await reader.readexactly(size)
    api, version, correlation, client = struct.unpack_from(">hhih", data)
    assert data[10 : 10 + client] == b"test"
    return (api, version), correlation, data[10 + client :]


def frame(correlation: int, body: bytes) -> bytes:
    return struct.pack(">ii", 4 + len(body), correlation) + body


async def ask(connection: Connection, *bodies: bytes) -> list[bytes | None]:
    replies: list[bytes | None] = []
    answered = asyncio.Event()

    def on_reply(reply: bytes | None) -> None:
        replies.append(reply)
        if len(replies) == len(bodies):
            answered.set()

    for body in bodies:
        connection.request(FETCH, body, on_reply)
    async with asyncio.timeout(5):
        await answered.wait()
    return replies


async def test_requests_are_answered_in_their_order_however_the_bytes_arrive() -> None:
    async def echo_in_pieces(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        replies = b""
        for _ in range(3):
            api, correlation, body = await read_request(reader)
            assert api == FETCH
            replies += frame(correlation, body)
        for byte in replies:
            writer.write(bytes([byte]))
            await writer.drain()

    async with connected(echo_in_pieces) as connection:
        assert await ask(connection, b"one", b"", b"three" * 100) == [b"one", b"", b"three" * 100]


async def test_requests_still_open_when_the_connection_is_lost_are_told_so() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, correlation, body = await read_request(reader)
        writer.write(frame(correlation, body))
        await writer.drain()
        await read_request(reader)
        writer.close()

    async with connected(hang_up) as connection:
        assert await ask(connection, b"one", b"two", b"three") == [b"one", None, None]
        assert connection.closed
        assert await ask(connection, b"four") == [None]


async def test_a_broker_that_does_not_answer_in_time_counts_as_lost() -> None:
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with connected(say_nothing, timeout_s=0.1) as connection:
        assert await ask(connection, b"one") == [None]
        assert connection.closed


@pytest.mark.parametrize(
    "answer",
    [
        frame(99, b"another request's"),
        struct.pack(">i", -1),
        struct.pack(">i", 1 << 30),
        b"HTTP/1.1 400 Bad Request",
    ],
)
async def test_a_server_that_is_no_kafka_is_hung_up_on(answer: bytes) -> None:
    async def misbehave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(answer)
        await reader.read()
        writer.close()

    async with connected(misbehave) as connection:
        assert await ask(connection, b"one") == [None]
        assert connection.closed
