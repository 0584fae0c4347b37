"""Sending records: in order per partition, none lost and none twice, with as little as possible between call and socket.

One batch per partition is on its way at a time, and leaves within the call when none is; what comes meanwhile leaves
with the next. Partitions don't wait for each other. A batch whose fate is unknown is sent again unchanged until the
broker has said what became of it: it knows a batch by producer, partition and sequence number, and takes it once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from aiokafka.errors import (
    DuplicateSequenceNumber,
    InvalidProducerEpoch,
    KafkaConnectionError,
    KafkaError,
    LeaderNotAvailableError,
    NoError,
    OutOfOrderSequenceNumber,
    UnknownProducerId,
    for_code,
)

from shared.errors import ProtocolError
from shared.kafka.cluster import RETRY_S, Cluster
from shared.kafka.wire import (
    NO_PRODUCER,
    PRODUCE,
    Connection,
    Header,
    Outgoing,
    decode_produce,
    encode_batch,
    encode_produce,
)

BATCH_BYTES: Final = 256 << 10
"""A batch ends here, unless its first record alone is longer."""

SEQUENCES: Final = 1 << 31

_log = logging.getLogger(__name__)

_IDENTITY_LOST = (InvalidProducerEpoch, OutOfOrderSequenceNumber, UnknownProducerId)


@dataclass(frozen=True, slots=True)
class _Identity:
    """By what the broker knows an idempotent producer; the default is a producer that it doesn't know."""

    producer_id: int = NO_PRODUCER
    epoch: int = NO_PRODUCER


@dataclass(frozen=True, slots=True)
class _Pending:
    record: Outgoing
    settled: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class _Batch:
    """Records that share their fate, as they are sent under one identity and sequence number."""

    pending: list[_Pending]
    encoded: bytes
    identity: _Identity


@dataclass(slots=True)
class _Queue:
    """A partition's records: those on their way in `batch`, then `waiting`. `busy` while either makes progress."""

    name: str
    partition: int
    waiting: deque[_Pending] = field(default_factory=deque)
    batch: _Batch | None = None
    busy: bool = False
    identity: _Identity = field(default_factory=_Identity)
    sequence: int = 0

    def fill(self, identity: _Identity) -> None:
        """Make a batch of what waits, after what an earlier identity left behind; none if nobody wants it any more."""
        if self.batch is not None:
            self.waiting.extendleft(reversed(self.batch.pending))
            self.batch = None
        if self.identity != identity:
            self.identity, self.sequence = identity, 0
        wanted = [each for each in self.waiting if not each.settled.done()]
        self.waiting.clear()
        if not wanted:
            return
        sequence = self.sequence if identity.producer_id != NO_PRODUCER else NO_PRODUCER
        encoded, count = encode_batch(
            (each.record for each in wanted),
            producer_id=identity.producer_id,
            producer_epoch=identity.epoch,
            sequence=sequence,
            size_limit=BATCH_BYTES,
        )
        self.batch = _Batch(wanted[:count], encoded, identity)
        self.waiting.extend(wanted[count:])

    def settle(self, error: Exception | None) -> None:
        """The batch has found its end."""
        batch, self.batch = self.batch, None
        if batch is None:
            return
        if error is None:
            self.sequence = (self.sequence + len(batch.pending)) % SEQUENCES
        for each in batch.pending:
            _settle(each, error)

    def give_up(self, error: Exception) -> None:
        """Neither the batch nor what waits will be sent."""
        self.settle(error)
        while self.waiting:
            _settle(self.waiting.popleft(), error)

    @property
    def wanted(self) -> bool:
        """Somebody waits for a record here."""
        batch = self.batch.pending if self.batch is not None else []
        return any(not each.settled.done() for each in (*batch, *self.waiting))


class Producer:
    """Sends to any partition of any topic of the cluster.

    A `persistent` producer sends again until it knows the end; another gives records up with their connection. What
    waits is bounded by those who wait for it.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        purpose: str,
        acks: int,
        idempotent: bool,
        persistent: bool,
        timeout_s: float,
    ) -> None:
        self._cluster = cluster
        self._purpose = purpose
        self._acks = acks
        self._persistent = persistent
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._identity = None if idempotent else _Identity()
        self._queues: dict[tuple[str, int], _Queue] = {}
        self._connections: dict[int, Connection] = {}
        self._mending = asyncio.Lock()
        self._recoveries: set[asyncio.Task[None]] = set()

    def send(
        self, name: str, partition: int, value: bytes, *, key: bytes | None, headers: list[Header]
    ) -> asyncio.Future[None]:
        """Send; the future is done when the broker has the record, and fails with `KafkaError` when it never will.

        Cancelling the future withdraws the record if it has not left yet.
        """
        queue = self._queues.get((name, partition))
        if queue is None:
            queue = self._queues[(name, partition)] = _Queue(name, partition)
        pending = _Pending(Outgoing(value, key, headers, int(time.time() * 1000)), self._loop.create_future())
        queue.waiting.append(pending)
        if not queue.busy:
            self._advance(queue)
        return pending.settled

    async def stop(self, within_s: float) -> bool:
        """Wait for what is on its way, then close. False when the broker did not take everything in time."""
        unsettled = [
            each.settled
            for queue in self._queues.values()
            for each in (*(queue.batch.pending if queue.batch is not None else ()), *queue.waiting)
            if not each.settled.done()
        ]
        if unsettled:
            await asyncio.wait(unsettled, timeout=within_s)
        for task in self._recoveries:
            task.cancel()
        complete = not any(queue.wanted for queue in self._queues.values())
        for queue in self._queues.values():
            queue.busy = True
            queue.give_up(KafkaConnectionError("the producer was stopped"))
        for connection in self._connections.values():
            connection.close()
        return complete

    # --- the inside -------------------------------------------------------------------------------------------

    def _advance(self, queue: _Queue) -> None:
        """Send the batch that is open, or the next one; find a way to the broker first where there is none."""
        identity, connection = self._identity, self._connection_for(queue)
        if identity is None or connection is None:
            self._recover(queue, delay_s=0.0)
            return
        if queue.batch is None or queue.batch.identity != identity:
            queue.fill(identity)
        queue.busy = queue.batch is not None
        if queue.batch is None:
            return
        request = encode_produce(
            queue.name,
            queue.partition,
            queue.batch.encoded,
            acks=self._acks,
            timeout_ms=int(self._timeout_s * 1000),
        )
        connection.request(PRODUCE, request, partial(self._answered, queue))

    def _answered(self, queue: _Queue, reply: bytes | None) -> None:
        if queue.batch is None:
            return
        error = _error_in(reply)
        if error is None or isinstance(error, DuplicateSequenceNumber):
            queue.settle(None)
        elif self._persistent and isinstance(error, _IDENTITY_LOST):
            # The broker has lost what it knew of us (only with data, so that it can't tell a repeat from a gap).
            _log.warning(
                "%s/%d: the broker knows the producer no more: %r", queue.name, queue.partition, error
            )
            if self._identity == queue.batch.identity:
                self._identity = None
            self._recover(queue, delay_s=RETRY_S)
            return
        elif self._persistent and error.retriable:
            self._recover(queue, delay_s=RETRY_S)
            return
        else:
            queue.settle(error)
        queue.busy = bool(queue.waiting)
        if queue.busy:
            self._advance(queue)

    def _recover(self, queue: _Queue, *, delay_s: float) -> None:
        queue.busy = True
        task = self._loop.create_task(
            self._find_way(queue, delay_s), name=f"reach {queue.name}/{queue.partition}"
        )
        self._recoveries.add(task)
        task.add_done_callback(self._recoveries.discard)

    async def _find_way(self, queue: _Queue, delay_s: float) -> None:
        """Get what sending needs, leader, connection and identity, and then go on."""
        while True:
            if delay_s:
                await asyncio.sleep(delay_s)
                await self._cluster.refresh()
            if not queue.wanted:
                self._forget(queue)
                return
            try:
                async with self._mending:
                    await self._mend(queue)
            except (KafkaError, OSError) as error:
                _log.debug("%s/%d can't be reached: %r", queue.name, queue.partition, error)
                if not self._persistent:
                    queue.give_up(
                        KafkaConnectionError(f"{queue.name}/{queue.partition} can't be reached: {error!r}")
                    )
                delay_s = RETRY_S
            else:
                self._advance(queue)
                return

    def _forget(self, queue: _Queue) -> None:
        """Everybody has given up waiting: stop trying.

        A batch may have arrived or not, so that its sequence numbers can't be used again: the identity goes with it.
        """
        if queue.batch is not None and queue.batch.identity.producer_id != NO_PRODUCER:
            self._identity = None
        queue.give_up(KafkaConnectionError("nobody waits"))
        queue.busy = False

    async def _mend(self, queue: _Queue) -> None:
        node = self._cluster.leader(queue.name, queue.partition)
        if node is None:
            raise LeaderNotAvailableError(f"{queue.name}/{queue.partition}")
        connection = self._connections.get(node)
        if connection is None or connection.closed:
            self._connections[node] = await self._cluster.connect(
                node, purpose=self._purpose, timeout_s=self._timeout_s
            )
        if self._identity is None:
            self._identity = _Identity(*await self._cluster.new_producer_id())

    def _connection_for(self, queue: _Queue) -> Connection | None:
        node = self._cluster.leader(queue.name, queue.partition)
        connection = self._connections.get(node) if node is not None else None
        return None if connection is None or connection.closed else connection


def _settle(pending: _Pending, error: Exception | None) -> None:
    if pending.settled.done():
        return
    if error is None:
        pending.settled.set_result(None)
    else:
        pending.settled.set_exception(error)


def _error_in(reply: bytes | None) -> KafkaError | None:
    """What the broker objects to; a lost connection is `KafkaConnectionError`, which may be tried again."""
    if reply is None:
        return KafkaConnectionError("the connection was lost")
    try:
        error = for_code(decode_produce(reply).error)
    except ProtocolError as malformed:
        return KafkaError(malformed.message)
    return None if error is NoError else error()
