"""Kafka's wire protocol, as much of it as the path of a round needs: produce and fetch, over one connection.

No retries, no metadata, no tasks: bytes become replies in a callback. Layouts are those of
https://kafka.apache.org/protocol for Produce version 7 (brokers since 2.1) and Fetch version 4 (since 0.11); Kafka 4
still speaks both.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, cast

from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords

from shared.errors import ProtocolError

PRODUCE: Final = (0, 7)
FETCH: Final = (1, 4)

NO_PRODUCER: Final = -1
MAX_REPLY_BYTES: Final = 64 << 20
"""A longer reply is none of Kafka's: whatever answers at that address is something else."""

Header = tuple[str, bytes]
OnReply = Callable[[bytes | None], None]

_INT32 = struct.Struct(">i")
_REQUEST = struct.Struct(">ihhih")
_PRODUCE_HEAD = struct.Struct(">hhii")
_PRODUCE_PARTITION = struct.Struct(">ii")
_PRODUCED = struct.Struct(">ihqqq")
_FETCH_HEAD = struct.Struct(">iiiibi")
_FETCH_PARTITION = struct.Struct(">iqi")
_FETCHED = struct.Struct(">ihqqi")
_ABORTED_BYTES = 16


class Record(Protocol):
    """A record as it comes out of a batch."""

    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]: ...


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A record on its way. `timestamp_ms` is the sender's clock."""

    value: bytes
    key: bytes | None
    headers: list[Header]
    timestamp_ms: int


class Connection(asyncio.Protocol):
    """One connection to a broker, which answers requests in their order.

    `request` calls back with the reply, or with None when the connection is lost before it came; a broker that leaves
    a request unanswered for `timeout_s` counts as lost.
    """

    def __init__(self, client: str, timeout_s: float) -> None:
        self._client = client.encode()
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._waiting: deque[tuple[int, float, OnReply]] = deque()
        self._correlation = 0
        self._watch: asyncio.TimerHandle | None = None

    @classmethod
    async def open(cls, host: str, port: int, *, client: str, timeout_s: float) -> Connection:
        """Connect. Raises `OSError`, or `TimeoutError` after `timeout_s`."""
        async with asyncio.timeout(timeout_s):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: cls(client, timeout_s), host, port
            )
        return connection

    @property
    def closed(self) -> bool:
        """Nothing can be sent any more."""
        return self._transport is None or self._transport.is_closing()

    def request(self, api: tuple[int, int], body: bytes, on_reply: OnReply) -> None:
        """Send a request of the API (key, version)."""
        if self._transport is None or self._transport.is_closing():
            self._loop.call_soon(on_reply, None)
            return
        self._correlation = (self._correlation + 1) & 0x7FFFFFFF
        now = self._loop.time()
        self._waiting.append((self._correlation, now, on_reply))
        if self._watch is None:
            self._watch = self._loop.call_later(self._timeout_s, self._check_age)
        client = self._client
        head = _REQUEST.pack(
            _REQUEST.size - 4 + len(client) + len(body), *api, self._correlation, len(client)
        )
        self._transport.write(b"".join((head, client, body)))

    def close(self) -> None:
        """Close at once; requests still open are lost."""
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio.Protocol -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= _INT32.size:
            (size,) = _INT32.unpack_from(self._buffer)
            if not _INT32.size <= size <= MAX_REPLY_BYTES:
                self.close()
                return
            end = _INT32.size + size
            if len(self._buffer) < end:
                return
            frame = bytes(self._buffer[_INT32.size : end])
            del self._buffer[:end]
            if not self._waiting or self._waiting[0][0] != _INT32.unpack_from(frame)[0]:
                self.close()
                return
            self._waiting.popleft()[2](frame[_INT32.size :])

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._watch is not None:
            self._watch.cancel()
        waiting, self._waiting = self._waiting, deque()
        for _, _, on_reply in waiting:
            on_reply(None)

    def _check_age(self) -> None:
        self._watch = None
        if not self._waiting:
            return
        left = self._waiting[0][1] + self._timeout_s - self._loop.time()
        if left > 0:
            self._watch = self._loop.call_later(left, self._check_age)
        else:
            self.close()


# --- produce ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Produced:
    """The broker's answer for one partition: Kafka's error code (0 is none) and the first record's offset."""

    error: int
    offset: int


def encode_batch(
    records: Iterable[Outgoing], *, producer_id: int, producer_epoch: int, sequence: int, size_limit: int
) -> tuple[bytes, int]:
    """As many of the records as fit into one batch, at least one; returns it and how many they were.

    An idempotent producer numbers its records per partition: `sequence` is the number of the first.
    """
    builder = DefaultRecordBatchBuilder(2, 0, 0, producer_id, producer_epoch, sequence, size_limit)
    count = 0
    for record in records:
        if not builder.append(
            count, timestamp=record.timestamp_ms, key=record.key, value=record.value, headers=record.headers
        ):
            break
        count += 1
    return bytes(builder.build()), count


def encode_produce(
    batches: Mapping[str, Sequence[tuple[int, bytes]]], *, acks: int, timeout_ms: int
) -> bytes:
    """A produce request: by topic, partitions and the batch for each."""
    parts = [_PRODUCE_HEAD.pack(-1, acks, timeout_ms, len(batches))]
    for topic, partitions in batches.items():
        parts += _string(topic), _INT32.pack(len(partitions))
        for partition, batch in partitions:
            parts += _PRODUCE_PARTITION.pack(partition, len(batch)), batch
    return b"".join(parts)


def decode_produce(reply: bytes) -> dict[tuple[str, int], Produced]:
    """The answer to a produce request, by topic and partition. Raises `ProtocolError` when it is none."""
    produced: dict[tuple[str, int], Produced] = {}
    try:
        (topics,) = _INT32.unpack_from(reply)
        position = _INT32.size
        for _ in range(topics):
            topic, position = _read_string(reply, position)
            (partitions,) = _INT32.unpack_from(reply, position)
            position += _INT32.size
            for _ in range(partitions):
                partition, error, offset, _, _ = _PRODUCED.unpack_from(reply, position)
                produced[topic, partition] = Produced(error, offset)
                position += _PRODUCED.size
    except (struct.error, UnicodeDecodeError) as malformed:
        raise ProtocolError(f"not an answer to a produce request: {malformed}") from None
    return produced


# --- fetch ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fetched:
    """The broker's answer for one partition: Kafka's error code (0 is none) and batches, the last perhaps cut off."""

    partition: int
    error: int
    batches: bytes

    def read(self, since: int) -> tuple[list[Record], int]:
        """The records from offset `since` on, and where to read on.

        A batch comes whole, though it may begin before `since`, and may hold nothing for us. Raises `ProtocolError` for
        a corrupt one.
        """
        records: list[Record] = []
        memory = MemoryRecords(self.batches)
        after = since
        while memory.has_next():
            batch = memory.next_batch()
            if not batch.validate_crc():
                raise ProtocolError("a batch of records is corrupt: its checksum is wrong")
            if not batch.is_control_batch:
                records.extend(record for record in batch if record.offset >= since)
            after = max(after, batch.next_offset)
        return records, after


def encode_fetch(
    topic: str,
    positions: Iterable[tuple[int, int]],
    *,
    max_wait_ms: int,
    max_bytes: int,
    partition_bytes: int,
) -> bytes:
    """A request for what follows these (partition, offset), answered at once when there is something."""
    partitions = [
        _FETCH_PARTITION.pack(partition, offset, partition_bytes) for partition, offset in positions
    ]
    return b"".join(
        (
            _FETCH_HEAD.pack(-1, max_wait_ms, 1, max_bytes, 0, 1),
            _string(topic),
            _INT32.pack(len(partitions)),
            *partitions,
        )
    )


def decode_fetch(reply: bytes) -> list[Fetched]:
    """The answer for each partition. Raises `ProtocolError` when it is none."""
    try:
        (topics,) = _INT32.unpack_from(reply, _INT32.size)
        position = 2 * _INT32.size
        fetched = []
        for _ in range(topics):
            _, position = _read_string(reply, position)
            (partitions,) = _INT32.unpack_from(reply, position)
            position += _INT32.size
            for _ in range(partitions):
                partition, error, _, _, aborted = _FETCHED.unpack_from(reply, position)
                position += _FETCHED.size + max(aborted, 0) * _ABORTED_BYTES
                (size,) = _INT32.unpack_from(reply, position)
                position += _INT32.size
                fetched.append(Fetched(partition, error, reply[position : position + max(size, 0)]))
                position += max(size, 0)
    except (struct.error, UnicodeDecodeError) as malformed:
        raise ProtocolError(f"not an answer to a fetch request: {malformed}") from None
    return fetched


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack(">h", len(encoded)) + encoded


def _read_string(data: bytes, position: int) -> tuple[str, int]:
    (size,) = struct.unpack_from(">h", data, position)
    end = position + 2 + size
    return data[position + 2 : end].decode(), end
