"""Sending records: in order per partition, none lost and none twice, with as little as possible between call and socket.

One request is on its way to a broker at a time, since a broker reads the next one of a connection only when it has
answered; it holds a batch for every partition that has something to send. What comes within one turn of the event loop
leaves at its end when no request is on its way, and else with the next one. A batch whose fate is unknown is sent again
unchanged until the broker has said what became of it: it knows a batch by producer, partition and sequence number, and
takes it once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from aiokafka.errors import (
    DuplicateSequenceNumber,
    InvalidProducerEpoch,
    KafkaConnectionError,
    KafkaError,
    LeaderNotAvailableError,
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


@dataclass(slots=True)
class _Way:
    """A connection to a broker; `ready` are the partitions whose batch goes with the next request."""

    connection: Connection
    ready: list[_Queue] = field(default_factory=list)
    asking: bool = False


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
        self._ways: dict[int, _Way] = {}
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
        for way in self._ways.values():
            way.connection.close()
        return complete

    # --- the inside -------------------------------------------------------------------------------------------

    def _advance(self, queue: _Queue) -> None:
        """Have the batch that is open, or the next one, sent with the next request; find a way to the broker first where
        there is none."""
        way = self._way_for(queue)
        if self._identity is None or way is None:
            self._recover(queue, delay_s=0.0)
            return
        queue.busy = True
        way.ready.append(queue)
        if not way.asking and len(way.ready) == 1:
            self._loop.call_soon(self._ask, way)

    def _ask(self, way: _Way) -> None:
        """Send a batch of every partition that is ready."""
        ready, way.ready = way.ready, []
        identity = self._identity
        if identity is None or way.connection.closed:
            for queue in ready:
                self._recover(queue, delay_s=0.0)
            return
        asked: dict[tuple[str, int], _Queue] = {}
        batches: dict[str, list[tuple[int, bytes]]] = {}
        for queue in ready:
            if queue.batch is None or queue.batch.identity != identity:
                queue.fill(identity)
            queue.busy = queue.batch is not None
            if queue.batch is not None:
                asked[queue.name, queue.partition] = queue
                batches.setdefault(queue.name, []).append((queue.partition, queue.batch.encoded))
        if not asked:
            return
        way.asking = True
        request = encode_produce(batches, acks=self._acks, timeout_ms=int(self._timeout_s * 1000))
        way.connection.request(PRODUCE, request, partial(self._answered, way, asked))

    def _answered(self, way: _Way, asked: Mapping[tuple[str, int], _Queue], reply: bytes | None) -> None:
        way.asking = False
        errors = _errors_in(reply, asked)
        for place, queue in asked.items():
            self._told(queue, errors[place])
        if way.ready:
            self._ask(way)

    def _told(self, queue: _Queue, error: KafkaError | None) -> None:
        """The broker has answered about the queue's batch."""
        if queue.batch is None:
            return
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
        way = self._ways.get(node)
        if way is None or way.connection.closed:
            self._ways[node] = _Way(
                await self._cluster.connect(node, purpose=self._purpose, timeout_s=self._timeout_s)
            )
        if self._identity is None:
            self._identity = _Identity(*await self._cluster.new_producer_id())

    def _way_for(self, queue: _Queue) -> _Way | None:
        node = self._cluster.leader(queue.name, queue.partition)
        way = self._ways.get(node) if node is not None else None
        return None if way is None or way.connection.closed else way


def _settle(pending: _Pending, error: Exception | None) -> None:
    if pending.settled.done():
        return
    if error is None:
        pending.settled.set_result(None)
    else:
        pending.settled.set_exception(error)


def _errors_in(
    reply: bytes | None, asked: Iterable[tuple[str, int]]
) -> dict[tuple[str, int], KafkaError | None]:
    """What the broker objects to; a lost connection is `KafkaConnectionError`, which may be tried again."""
    if reply is None:
        return dict.fromkeys(asked, KafkaConnectionError("the connection was lost"))
    try:
        produced = decode_produce(reply)
        return {place: _error(produced[place].error) for place in asked}
    except ProtocolError as malformed:
        return dict.fromkeys(asked, KafkaError(malformed.message))
    except KeyError as left_out:
        return dict.fromkeys(asked, KafkaError(f"an answer without {left_out}"))


def _error(code: int) -> KafkaError | None:
    return for_code(code)() if code else None
