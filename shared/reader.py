"""Reading one topic from Kafka: typed messages in, progress out. `shared.bus.Bus` makes the readers.

Two kinds share one loop. A `Reader` over explicit partitions starts at an end of the log and keeps no progress (a
gateway reads its reply partition so: no rebalance on the hot path). A `GroupReader` shares the topic with the other
members of its group and commits how far everything before was handled (`Watermark`), so that a message is read again
after a crash unless it was reported `done`. What cannot be decoded goes to the dead letters and is skipped.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import inspect
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Final, Generic, Self, TypeVar, cast

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import CommitFailedError, ConsumerStoppedError, IllegalStateError, KafkaError
from prometheus_client import Counter

from shared.errors import BrokerUnavailable, OutriderError, ProtocolError
from shared.protocol import SCHEMA_VERSION, AnyMessage, DeadLetter, Topic, decode
from shared.telemetry import TRACEPARENT, TraceContext

SCHEMA_HEADER: Final = "outrider-schema"

COMMIT_INTERVAL_S: Final = 0.5
"""A crash repeats at most the messages of half a second, which readers answer from what is committed in Redis."""

COMMIT_DEADLINE_S: Final = 3.0
POLL_S: Final = 1.0
RETRY_S: Final = 0.1

_log = logging.getLogger(__name__)

M = TypeVar("M", bound=AnyMessage)

PartitionsCallback = Callable[[frozenset[int]], Awaitable[None] | None]


class MemberNameTaken(OutriderError):
    """Another process has joined the consumer group under this member's name."""

    code: ClassVar[str] = "member_name_taken"
    status: ClassVar[int] = 409
    kind: ClassVar[str] = "conflict_error"


@dataclass(frozen=True, slots=True)
class Received(Generic[M]):
    """A message with where it was read. `timestamp_ms` is the sender's clock."""

    message: M
    topic: Topic
    partition: int
    offset: int
    trace: TraceContext | None
    timestamp_ms: int


class Watermark:
    """How far a partition was handled without a gap: messages may be done in any order, progress is the first open one.

    `position` is the offset to commit: everything before it is done.
    """

    def __init__(self) -> None:
        self._open: dict[int, None] = {}
        self._next: int | None = None
        self._committed: int | None = None

    def delivered(self, offset: int) -> None:
        """`offset` was handed out; offsets grow, but may skip (Kafka keeps some to itself)."""
        self._open[offset] = None
        self._next = offset + 1

    def done(self, offset: int) -> None:
        """`offset` was handled. Unknown ones (done twice, or from before a move) change nothing."""
        self._open.pop(offset, None)

    @property
    def open(self) -> int:
        """How many messages were handed out and are not done."""
        return len(self._open)

    @property
    def next(self) -> int | None:
        """The offset to read next; None before the first message."""
        return self._next

    @property
    def position(self) -> int | None:
        """The offset to commit; None before the first message."""
        return next(iter(self._open), self._next)

    @property
    def uncommitted(self) -> int | None:
        """`position`, if it has not been committed."""
        return None if self.position == self._committed else self.position

    def committed(self, offset: int) -> None:
        """`offset` has been committed."""
        self._committed = offset


@dataclass(frozen=True, slots=True)
class ReaderPlan:
    """What a reader reads and how: made by the bus, see there for the reasons of the consumer's `options`."""

    topic: Topic
    name: str
    reader: str
    address: str
    deadline_s: float
    queue: int
    options: Mapping[str, object]
    send_dead_letter: Callable[[DeadLetter], Awaitable[None]]
    received: Counter
    dead_letters: Counter


class Reader(Generic[M]):
    """An async context manager and iterator over the messages of some partitions, in order within each.

    For one task at a time. Backs off by itself: nothing is fetched while fetched messages wait to be taken. A broker
    that goes away and comes back is waited for; iteration ends with `stop`.
    """

    def __init__(self, plan: ReaderPlan, *, partitions: Sequence[int], from_end: bool) -> None:
        self._plan = plan
        self._partitions = frozenset(partitions)
        self._from_end = from_end
        self._positions: dict[int, int] = {}
        self._ready: deque[ConsumerRecord] = deque()
        self._consumer: AIOKafkaConsumer | None = None
        self._failure: OutriderError | None = None
        self._stopping = False

    @property
    def assigned(self) -> frozenset[int]:
        """The partitions that this reader reads now."""
        return self._partitions

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Take the partitions up: whatever is sent after this returns will be read.

        Raises `BrokerUnavailable` when that takes longer than the bus's deadline.
        """
        try:
            async with asyncio.timeout(self._plan.deadline_s):
                while True:
                    try:
                        await self._open()
                        return
                    except (KafkaError, OSError) as error:
                        _log.debug("reader of %s does not start yet: %r", self._plan.name, error)
                        await asyncio.sleep(RETRY_S)
        except TimeoutError:
            raise BrokerUnavailable(
                f"{self._plan.name} can't be read from Kafka at {self._plan.address} within "
                f"{self._plan.deadline_s:g} s: check that the broker runs and that OUTRIDER_KAFKA is its address"
            ) from None

    async def stop(self) -> None:
        """End the iteration and let the partitions go."""
        self._stopping = True
        await self._close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Received[M]:
        while True:
            if self._failure is not None:
                raise self._failure
            if self._stopping:
                raise StopAsyncIteration
            if not self._ready:
                await self._fetch()
                continue
            record = self._ready[0]
            try:
                message = decode(
                    self._plan.topic,
                    record.value or b"",
                    version=_header(record, SCHEMA_HEADER) or SCHEMA_VERSION,
                )
            except ProtocolError as error:
                await self._bury(record, error.message)
                continue
            self._ready.popleft()
            self._plan.received.inc()
            return Received(
                message=cast(M, message),
                topic=self._plan.topic,
                partition=record.partition,
                offset=record.offset,
                trace=TraceContext.from_header(_header(record, TRACEPARENT)),
                timestamp_ms=record.timestamp,
            )

    def done(self, received: Received[M]) -> None:
        """The message was handled. Readers over explicit partitions keep no progress, so nothing happens."""

    async def seek_to_end(self) -> None:
        """Skip everything sent so far."""
        consumer = self._require_consumer()
        self._ready.clear()
        async with asyncio.timeout(self._plan.deadline_s):
            await consumer.seek_to_end()

    # --- the inside -------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        consumer = AIOKafkaConsumer(**self._options())
        try:
            self._subscribe(consumer)
            await consumer.start()
            await self._take_up(consumer)
        except BaseException:
            await _stop_consumer(consumer)
            raise
        self._consumer = consumer

    def _options(self) -> Mapping[str, object]:
        return self._plan.options

    def _subscribe(self, consumer: AIOKafkaConsumer) -> None:
        """What must be said before the consumer starts."""

    async def _take_up(self, consumer: AIOKafkaConsumer) -> None:
        partitions = [TopicPartition(self._plan.name, number) for number in sorted(self._partitions)]
        consumer.assign(partitions)
        fresh = [each for each in partitions if each.partition not in self._positions]
        for each in partitions:
            if each.partition in self._positions:
                consumer.seek(each, self._positions[each.partition])
        if fresh:
            # Both wait until the broker has said where the end is: what is sent from now on is read.
            await (consumer.seek_to_end(*fresh) if self._from_end else consumer.seek_to_beginning(*fresh))
            for each in fresh:
                self._positions[each.partition] = await consumer.position(each)

    async def _close(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await _stop_consumer(consumer)

    async def _fetch(self) -> None:
        try:
            batches = await self._require_consumer().getmany(
                timeout_ms=int(POLL_S * 1000), max_records=await self._room()
            )
        except ConsumerStoppedError:
            if not self._stopping and self._failure is None:
                raise BrokerUnavailable(f"the reader of {self._plan.name} was stopped") from None
        except KafkaError as error:
            await self._mend(error)
        else:
            for records in batches.values():
                self._ready.extend(records)
                self._delivered(records)

    async def _mend(self, error: KafkaError) -> None:
        """After an error of the client: wait, and begin anew where it can't go on by itself."""
        _log.warning("reading %s: %r", self._plan.name, error)
        await asyncio.sleep(RETRY_S)
        if error.retriable:
            return
        await self._close()
        while self._consumer is None and not self._stopping:
            try:
                await self.start()
            except BrokerUnavailable as unavailable:
                _log.error("%s; trying on", unavailable.message)
        if self._stopping:
            await self._close()

    async def _room(self) -> int:
        """How many messages may be taken now."""
        return self._plan.queue

    def _delivered(self, records: Sequence[ConsumerRecord]) -> None:
        self._positions[records[-1].partition] = records[-1].offset + 1

    async def _bury(self, record: ConsumerRecord, reason: str) -> None:
        """Send what can't be read to the dead letters; when even that fails, the log keeps it."""
        letter = DeadLetter(
            source=self._plan.topic,
            partition=record.partition,
            offset=record.offset,
            reader=self._plan.reader,
            reason=reason,
            payload=base64.b64encode(record.value or b"").decode("ascii"),
            headers={
                key: value.decode("utf-8", "replace") for key, value in record.headers if value is not None
            },
        )
        _log.warning("dead letter: %s/%d@%d: %s", self._plan.name, record.partition, record.offset, reason)
        self._plan.dead_letters.inc()
        try:
            await self._plan.send_dead_letter(letter)
        except OutriderError as error:
            _log.error("dead letter is only here (%s): %s", error.message, letter.model_dump_json())
        if self._ready and self._ready[0] is record:
            self._ready.popleft()
        self._skipped(record)

    def _skipped(self, record: ConsumerRecord) -> None:
        """The record needs no handling."""

    def _require_consumer(self) -> AIOKafkaConsumer:
        if self._consumer is None:
            raise BrokerUnavailable(f"the reader of {self._plan.name} is not started: use `async with`")
        return self._consumer


class GroupReader(Reader[M]):
    """A reader that shares its topic with the other members of a consumer group.

    `assigned` changes as members come and go. `on_assigned` and `on_revoked` get the partitions that were won or lost
    (those kept are in neither); they run while the group waits, so they must be quick. Messages of a lost partition
    are dropped, those of a kept one go on without repeats.
    """

    def __init__(
        self,
        plan: ReaderPlan,
        *,
        member: str | None,
        group_members: Callable[[], Awaitable[frozenset[str]]],
        on_assigned: PartitionsCallback | None,
        on_revoked: PartitionsCallback | None,
    ) -> None:
        super().__init__(plan, partitions=(), from_end=False)
        self._member = member
        self._group_members = group_members
        self._on_assigned = on_assigned
        self._on_revoked = on_revoked
        self._watermarks: dict[int, Watermark] = {}
        self._member_id = ""
        self._room_made = asyncio.Event()
        self._committer: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await super().start()
        if self._committer is None:
            self._committer = asyncio.create_task(self._commit_regularly(), name=f"commit {self._plan.name}")

    async def stop(self) -> None:
        """Commit what is done and end. A named member stays in the group until its session times out.

        So a restart under the same name finds its partitions as it left them; for good, others get them by then.
        """
        self._stopping = True
        self._room_made.set()
        if self._committer is not None:
            self._committer.cancel()
            await asyncio.wait([self._committer])
            self._committer = None
            await self._commit()
        await super().stop()

    def done(self, received: Received[M]) -> None:
        """The message was handled and need not be read again after a crash. In any order."""
        watermark = self._watermarks.get(received.partition)
        if watermark is not None:
            watermark.done(received.offset)
            self._room_made.set()

    # --- the inside -------------------------------------------------------------------------------------------

    def _options(self) -> Mapping[str, object]:
        # The sticky assignor leaves partitions, and the KV behind them, where they are. It keeps its memory on the
        # class: one class a consumer, so that two in a process don't share it.
        assignor = type("StickyAssignor", (StickyPartitionAssignor,), {})
        return {**self._plan.options, "partition_assignment_strategy": (assignor,)}

    def _subscribe(self, consumer: AIOKafkaConsumer) -> None:
        self._member_id = ""
        consumer.subscribe([self._plan.name], listener=_Listener(self, consumer))

    async def _take_up(self, consumer: AIOKafkaConsumer) -> None:
        """Nothing to do: `consumer.start` returned when the group had given us our partitions."""

    async def _room(self) -> int:
        while (room := self._plan.queue - sum(each.open for each in self._watermarks.values())) < 1:
            if self._stopping:
                raise ConsumerStoppedError
            self._room_made.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._room_made.wait(), POLL_S)
        return room

    def _delivered(self, records: Sequence[ConsumerRecord]) -> None:
        watermark = self._watermarks.setdefault(records[0].partition, Watermark())
        for record in records:
            watermark.delivered(record.offset)

    def _skipped(self, record: ConsumerRecord) -> None:
        if (watermark := self._watermarks.get(record.partition)) is not None:
            watermark.done(record.offset)

    async def _commit_regularly(self) -> None:
        while True:
            await asyncio.sleep(COMMIT_INTERVAL_S)
            await self._commit()

    async def _commit(self) -> None:
        """Commit every watermark that has moved; what fails is tried again with the next one."""
        moved = {
            partition: offset
            for partition, watermark in self._watermarks.items()
            if (offset := watermark.uncommitted) is not None
        }
        if not moved or self._consumer is None:
            return
        try:
            async with asyncio.timeout(COMMIT_DEADLINE_S):
                await self._consumer.commit(
                    {
                        TopicPartition(self._plan.name, partition): offset
                        for partition, offset in moved.items()
                    }
                )
        except (TimeoutError, KafkaError) as error:
            # CommitFailedError and IllegalStateError: the partitions have moved, and their new reader repeats a little.
            expected = isinstance(error, CommitFailedError | IllegalStateError)
            _log.log(
                logging.INFO if expected else logging.WARNING, "commit on %s: %r", self._plan.name, error
            )
            return
        for partition, offset in moved.items():
            if (watermark := self._watermarks.get(partition)) is not None:
                watermark.committed(offset)

    async def _before_rebalance(self, consumer: AIOKafkaConsumer) -> None:
        if self._member_id and self._member is not None:
            await self._check_name(consumer)
        await self._commit()

    async def _check_name(self, consumer: AIOKafkaConsumer) -> None:
        """Stop when another process has joined under this member's name.

        Kafka then knows our member id no more, and aiokafka would join again, fencing the other, and so on for ever.
        The later one is right: it is what a restarted service is to its hung predecessor.
        """
        try:
            async with asyncio.timeout(COMMIT_DEADLINE_S):
                members = await self._group_members()
        except (TimeoutError, KafkaError, OutriderError) as error:
            _log.warning("members of the group on %s are not known: %r", self._plan.name, error)
            return
        namesakes = {each for each in members if _instance_of(each) == self._member}
        if namesakes and self._member_id not in namesakes:
            self._failure = MemberNameTaken(
                f"another process has joined the group of {self._plan.name} as {self._member!r}, so this one stops: "
                "every member of a consumer group needs a name of its own"
            )
            _log.error("%s", self._failure.message)
            self._partitions = frozenset()
            # Ends the coordination task of aiokafka, and with it the joining.
            raise asyncio.CancelledError

    async def _after_rebalance(self, consumer: AIOKafkaConsumer, now: frozenset[int]) -> None:
        lost, won = self._partitions - now, now - self._partitions
        self._partitions = now
        self._member_id = consumer._coordinator.member_id
        for partition in now - won:
            # aiokafka goes back to what is committed; we go on where we are.
            if (
                position := self._watermarks[partition].next if partition in self._watermarks else None
            ) is not None:
                consumer.seek(TopicPartition(self._plan.name, partition), position)
        for partition in lost | won:
            self._watermarks.pop(partition, None)
        self._ready = deque(record for record in self._ready if record.partition in now - won)
        self._room_made.set()
        for callback, partitions in ((self._on_revoked, lost), (self._on_assigned, won)):
            if callback is not None and partitions:
                outcome = callback(partitions)
                if inspect.isawaitable(outcome):
                    await outcome


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    """Tells a `GroupReader` of rebalances."""

    def __init__(self, reader: GroupReader[Any], consumer: AIOKafkaConsumer) -> None:
        self._reader = reader
        self._consumer = consumer

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        await self._reader._before_rebalance(self._consumer)

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        await self._reader._after_rebalance(self._consumer, frozenset(each.partition for each in assigned))


def _instance_of(member_id: str) -> str:
    """The static name in a member id: Kafka makes it `name-uuid`."""
    return member_id[:-37]


def _header(record: ConsumerRecord, name: str) -> str | None:
    for key, value in record.headers:
        if key == name and value is not None:
            return cast(bytes, value).decode("latin-1")
    return None


async def _stop_consumer(consumer: AIOKafkaConsumer) -> None:
    """Stop without waiting long for a broker that may be gone."""
    try:
        async with asyncio.timeout(COMMIT_DEADLINE_S):
            await consumer.stop()
    except (TimeoutError, KafkaError, asyncio.CancelledError) as error:
        if (
            isinstance(error, asyncio.CancelledError)
            and (task := asyncio.current_task())
            and task.cancelling()
        ):
            raise
        _log.debug("stopping a consumer: %r", error)
