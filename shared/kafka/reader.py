"""Reading one topic: typed messages out, progress back. `shared.bus.Bus` makes the readers.

Two kinds share one loop. A `Reader` over explicit partitions starts at an end of the log and keeps no progress (a
gateway reads its reply partition so: no rebalance on the hot path). A `GroupReader` shares the topic with the other
members of its group and commits how far everything before was handled (`Watermark`), so that a message is read again
after a crash unless it was reported `done`. What cannot be decoded goes to the dead letters and is skipped.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Final, Generic, Literal, Self, TypeVar, cast

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError
from prometheus_client import Counter

from shared.errors import BrokerUnavailable, OutriderError, ProtocolError
from shared.kafka.cluster import RETRY_S, Cluster
from shared.kafka.fetcher import Fetcher
from shared.kafka.wire import Record
from shared.protocol import SCHEMA_VERSION, AnyMessage, DeadLetter, Topic, decode
from shared.telemetry import TRACEPARENT, TraceContext

SCHEMA_HEADER: Final = "outrider-schema"

COMMIT_INTERVAL_S: Final = 0.5
"""A crash repeats at most the messages of half a second, which readers answer from what is committed in Redis."""

COMMIT_DEADLINE_S: Final = 3.0

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
    """What a reader reads and with what; made by the bus.

    `queue` is how many messages may wait to be taken, and in a group how many may be open.
    """

    topic: Topic
    name: str
    reader: str
    cluster: Cluster
    deadline_s: float
    queue: int
    fetch_wait_ms: int
    fetch_partition_bytes: int
    fetch_timeout_s: float
    send_dead_letter: Callable[[DeadLetter], Awaitable[None]]
    received: Counter
    dead_letters: Counter


class Reader(Generic[M]):
    """An async context manager and iterator over the messages of some partitions, in order within each.

    For one task at a time. Backs off by itself: nothing is fetched while enough fetched messages wait to be taken. A
    broker that goes away and comes back is waited for; iteration ends with `stop`.
    """

    def __init__(
        self, plan: ReaderPlan, *, partitions: Sequence[int], end: Literal["earliest", "latest"]
    ) -> None:
        self._plan = plan
        self._partitions = frozenset(partitions)
        self._end: Literal["earliest", "latest"] = end
        self._positioned: set[int] = set()
        self._ready: deque[tuple[int, Record]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._fetcher: Fetcher | None = None
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
                await self._start()
        except BaseException as error:
            await self.stop()
            if isinstance(error, TimeoutError):
                raise self._unavailable("read") from None
            raise

    async def stop(self) -> None:
        """End the iteration and let the partitions go."""
        self._stopping = True
        self._wake()
        if self._fetcher is not None:
            await self._fetcher.stop()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Received[M]:
        while True:
            if self._failure is not None:
                raise self._failure
            if self._stopping:
                raise StopAsyncIteration
            if not self._ready or not self._may_hand_out():
                await self._wait()
                continue
            partition, record = self._ready[0]
            try:
                message = decode(
                    self._plan.topic,
                    record.value or b"",
                    version=_header(record, SCHEMA_HEADER) or SCHEMA_VERSION,
                )
            except ProtocolError as error:
                await self._bury(partition, record, error.message)
                continue
            self._pop()
            self._handed_out(partition, record.offset)
            self._plan.received.inc()
            return Received(
                message=cast(M, message),
                topic=self._plan.topic,
                partition=partition,
                offset=record.offset,
                trace=TraceContext.from_header(_header(record, TRACEPARENT)),
                timestamp_ms=record.timestamp,
            )

    def done(self, received: Received[M]) -> None:
        """The message was handled. Readers over explicit partitions keep no progress, so nothing happens."""

    async def seek_to_end(self) -> None:
        """Skip everything sent so far. Raises `BrokerUnavailable` past the deadline."""
        fetcher = self._require_fetcher()
        try:
            async with asyncio.timeout(self._plan.deadline_s):
                ends = {
                    partition: await self._plan.cluster.offset(self._plan.name, partition, "latest")
                    for partition in self._partitions
                }
        except (TimeoutError, KafkaError):
            raise self._unavailable("sought") from None
        fetcher.read({**dict.fromkeys(self._partitions), **ends})
        self._ready.clear()

    # --- the inside -------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        self._fetcher = self._new_fetcher()
        self._fetcher.read(dict.fromkeys(sorted(self._partitions)))
        await self._fetcher.positioned()

    def _new_fetcher(self) -> Fetcher:
        return Fetcher(
            self._plan.cluster,
            self._plan.name,
            purpose=self._plan.topic,
            max_wait_ms=self._plan.fetch_wait_ms,
            partition_bytes=self._plan.fetch_partition_bytes,
            timeout_s=self._plan.fetch_timeout_s,
            find_position=self._find_position,
            on_records=self._arrived,
            has_room=lambda: len(self._ready) < self._plan.queue,
        )

    async def _find_position(self, partition: int) -> int:
        """Where to begin; and later, when a position has left the log, to go on with what is still there."""
        end = "earliest" if partition in self._positioned else self._end
        position = await self._plan.cluster.offset(self._plan.name, partition, end)
        self._positioned.add(partition)
        return position

    def _arrived(self, partition: int, records: Sequence[Record]) -> None:
        self._ready.extend((partition, record) for record in records)
        self._wake()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _pop(self) -> None:
        self._ready.popleft()
        if self._fetcher is not None and len(self._ready) <= self._plan.queue // 2:
            self._fetcher.room_made()

    def _may_hand_out(self) -> bool:
        return True

    def _handed_out(self, partition: int, offset: int) -> None:
        """The message at `offset` has left for whoever handles it."""

    def _skipped(self, partition: int, offset: int) -> None:
        """The record at `offset` needs no handling."""

    async def _bury(self, partition: int, record: Record, reason: str) -> None:
        """Send what can't be read to the dead letters; when even that fails, the log keeps it."""
        letter = DeadLetter(
            source=self._plan.topic,
            partition=partition,
            offset=record.offset,
            reader=self._plan.reader,
            reason=reason,
            payload=base64.b64encode(record.value or b"").decode("ascii"),
            headers={
                key: value.decode("utf-8", "replace") for key, value in record.headers if value is not None
            },
        )
        _log.warning("dead letter: %s/%d@%d: %s", self._plan.name, partition, record.offset, reason)
        self._plan.dead_letters.inc()
        try:
            await self._plan.send_dead_letter(letter)
        except OutriderError as error:
            _log.error("dead letter is only here (%s): %s", error.message, letter.model_dump_json())
        if self._ready and self._ready[0][1] is record:
            self._pop()
        self._skipped(partition, record.offset)

    def _require_fetcher(self) -> Fetcher:
        if self._fetcher is None:
            raise BrokerUnavailable(f"the reader of {self._plan.name} is not started: use `async with`")
        return self._fetcher

    def _unavailable(self, what: str) -> BrokerUnavailable:
        return BrokerUnavailable(
            f"{self._plan.name} could not be {what} in Kafka at {self._plan.cluster.bootstrap} within "
            f"{self._plan.deadline_s:g} s: check that the broker runs and that OUTRIDER_KAFKA is its address"
        )


class GroupReader(Reader[M]):
    """A reader that shares its topic with the other members of a consumer group.

    `assigned` changes as members come and go. `on_assigned` and `on_revoked` get the partitions that were won or lost
    (those kept are in neither); they run while the group waits, so they must be quick. Messages of a lost partition
    are dropped, those of a kept one go on without repeats.

    aiokafka's consumer is the member: it joins, keeps alive and commits. All its partitions are paused, as the records
    come through our own `Fetcher`.
    """

    def __init__(
        self,
        plan: ReaderPlan,
        *,
        group: str,
        member: str | None,
        consumer_options: Mapping[str, object],
        on_assigned: PartitionsCallback | None,
        on_revoked: PartitionsCallback | None,
    ) -> None:
        super().__init__(plan, partitions=(), end="earliest")
        self._group = group
        self._member = member
        self._consumer_options = consumer_options
        self._on_assigned = on_assigned
        self._on_revoked = on_revoked
        self._watermarks: dict[int, Watermark] = {}
        # Partitions just won, to be read from what their last reader has committed.
        self._committed_before: set[int] = set()
        self._consumer: AIOKafkaConsumer | None = None
        self._member_id = ""
        self._upkeep: asyncio.Task[None] | None = None

    async def stop(self) -> None:
        """Commit what is done and end. A named member stays in the group until its session times out.

        So a restart under the same name finds its partitions as it left them; for good, others get them by then.
        """
        self._stopping = True
        if self._upkeep is not None:
            self._upkeep.cancel()
            await asyncio.wait([self._upkeep])
        await self._commit()
        await self._leave()
        await super().stop()

    def done(self, received: Received[M]) -> None:
        """The message was handled and need not be read again after a crash. In any order."""
        watermark = self._watermarks.get(received.partition)
        if watermark is not None:
            watermark.done(received.offset)
            self._wake()

    # --- messages ---------------------------------------------------------------------------------------------

    def _may_hand_out(self) -> bool:
        return sum(each.open for each in self._watermarks.values()) < self._plan.queue

    def _handed_out(self, partition: int, offset: int) -> None:
        self._watermarks[partition].delivered(offset)

    def _skipped(self, partition: int, offset: int) -> None:
        if (watermark := self._watermarks.get(partition)) is not None:
            watermark.delivered(offset)
            watermark.done(offset)

    # --- membership -------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        self._fetcher = self._new_fetcher()
        await self._join()
        self._upkeep = asyncio.create_task(self._keep_up(), name=f"membership of {self._group}")
        self._upkeep.add_done_callback(self._upkeep_ended)

    def _upkeep_ended(self, task: asyncio.Task[None]) -> None:
        """Without upkeep nothing is committed: whoever reads must know."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = BrokerUnavailable(f"the membership of {self._group} has ended: {error!r}")
            self._wake()

    async def _join(self) -> None:
        """Become a member; tries until it is cancelled."""
        while self._consumer is None:
            try:
                await self._join_once()
            except (KafkaError, OSError) as error:
                _log.debug("joining %s: %r", self._group, error)
                await asyncio.sleep(RETRY_S)

    async def _join_once(self) -> None:
        # The sticky assignor leaves partitions, and the KV behind them, where they are. It keeps its memory on the
        # class: one class a consumer, so that two in a process don't share it.
        assignor = type("StickyAssignor", (StickyPartitionAssignor,), {})
        consumer = AIOKafkaConsumer(
            **self._consumer_options,
            group_id=self._group,
            group_instance_id=self._member,
            partition_assignment_strategy=(assignor,),
        )
        self._member_id = ""
        consumer.subscribe([self._plan.name], listener=_Listener(self, consumer))
        self._consumer = consumer
        try:
            await consumer.start()
        except BaseException:
            await self._leave()
            raise

    async def _leave(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await _stop_consumer(consumer)

    async def _keep_up(self) -> None:
        """Commit regularly, and join anew where the member can't go on by itself."""
        while self._failure is None:
            await asyncio.sleep(COMMIT_INTERVAL_S)
            await self._commit()
            try:
                await self._check_membership()
            except KafkaError as error:
                _log.warning("membership of %s: %r", self._group, error)
                if not error.retriable:
                    await self._leave()
                    await self._join()

    async def _check_membership(self) -> None:
        """Raise what aiokafka has to say of the membership: it does so when asked for records, of which there are none."""
        if self._consumer is None:
            return
        try:
            async with asyncio.timeout(COMMIT_DEADLINE_S):
                await self._consumer.getmany(timeout_ms=0)
        except TimeoutError:
            _log.debug("%s is rebalancing", self._group)

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

    async def _find_position(self, partition: int) -> int:
        earliest = await super()._find_position(partition)
        if partition not in self._committed_before or self._consumer is None:
            return earliest
        committed: int | None = await self._consumer.committed(TopicPartition(self._plan.name, partition))
        self._committed_before.discard(partition)
        return max(committed or 0, earliest)

    async def _before_rebalance(self) -> None:
        if self._member_id and self._member is not None:
            await self._check_name()
        await self._commit()

    async def _check_name(self) -> None:
        """Stop when another process has joined under this member's name.

        Kafka then knows our member id no more, and aiokafka would join again, fencing the other, and so on for ever.
        The later one is right: it is what a restarted service is to its hung predecessor.
        """
        try:
            async with asyncio.timeout(COMMIT_DEADLINE_S):
                members = await self._plan.cluster.group_members(self._group)
        except (TimeoutError, KafkaError, OutriderError) as error:
            _log.warning("the members of %s are not known: %r", self._group, error)
            return
        namesakes = {each for each in members if _instance_of(each) == self._member}
        if namesakes and self._member_id not in namesakes:
            self._failure = MemberNameTaken(
                f"another process has joined the group {self._group} as {self._member!r}, so this one stops: "
                "every member of a consumer group needs a name of its own"
            )
            _log.error("%s", self._failure.message)
            self._partitions = frozenset()
            self._require_fetcher().read({})
            self._wake()
            # Ends the coordination task of aiokafka, and with it the joining.
            raise asyncio.CancelledError

    async def _after_rebalance(self, consumer: AIOKafkaConsumer, now: frozenset[int]) -> None:
        if now:
            consumer.pause(*(TopicPartition(self._plan.name, partition) for partition in now))
        lost, won = self._partitions - now, now - self._partitions
        self._partitions = now
        self._member_id = consumer._coordinator.member_id
        for partition in lost:
            self._watermarks.pop(partition, None)
        self._watermarks.update((partition, Watermark()) for partition in won)
        self._committed_before = (self._committed_before & now) | won
        self._ready = deque(
            (partition, record) for partition, record in self._ready if partition in now - won
        )
        fetcher = self._require_fetcher()
        kept = {partition: position for partition, position in fetcher.positions.items() if partition in now}
        fetcher.read({**dict.fromkeys(sorted(now)), **kept})
        self._wake()
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
        await self._reader._before_rebalance()

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        await self._reader._after_rebalance(self._consumer, frozenset(each.partition for each in assigned))


def _instance_of(member_id: str) -> str:
    """The static name in a member id: Kafka makes it `name-uuid`."""
    return member_id[:-37]


def _header(record: Record, name: str) -> str | None:
    for key, value in record.headers:
        if key == name and value is not None:
            return value.decode("latin-1")
    return None


async def _stop_consumer(consumer: AIOKafkaConsumer) -> None:
    """Stop without waiting long for a broker that may be gone."""
    task = asyncio.current_task()
    cancels = task.cancelling() if task is not None else 0
    try:
        async with asyncio.timeout(COMMIT_DEADLINE_S):
            await consumer.stop()
    except (TimeoutError, KafkaError) as error:
        _log.debug("stopping a consumer: %r", error)
    except asyncio.CancelledError:
        # A coordination task that we ended ourselves, unless it is this task that is to end.
        if task is not None and task.cancelling() > cancels:
            raise
