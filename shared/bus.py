"""A typed asyncio bus over Kafka: messages of `shared.protocol` in and out, with what the services may rely on.

`send` returns when the broker has the message for good; `post` is for hints, which may be lost and must never be in a
verdict's way; readers are those of `shared.kafka.reader`. Beside a message travel the schema's version and the trace.

How it is set, and why:
- A message leaves at once and uncompressed: a block of 8 tokens is 200 bytes.
- Hints have a producer and a connection of their own, and every topic a reader and a connection of its own: a broker
  answers the requests of one connection in their order, so a verdict must not share one with hints.
- `acks=all` with idempotence: on one broker it costs nothing, and what is sent again after a lost connection arrives
  once. Hints have `acks=1` and are not sent again.
- An idle fetch waits 500 ms. Apache Kafka answers it the moment a message arrives, so this is only how often an idle
  reader asks anew. In a group it waits 100 ms, since a partition just won may wait behind the fetch before it. Tansu
  doesn't wake it: 10 ms.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, Final, Literal, NotRequired, Self, TypedDict, Unpack, overload
from weakref import WeakSet

from aiokafka.admin import NewTopic
from aiokafka.errors import KafkaError, MessageSizeTooLargeError
from aiokafka.partitioner import murmur2
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram

from shared.errors import BrokerUnavailable, ProtocolError
from shared.kafka.cluster import RETRY_S, Cluster
from shared.kafka.producer import Producer
from shared.kafka.reader import (
    SCHEMA_HEADER,
    GroupReader,
    MemberNameTaken,
    PartitionsCallback,
    Reader,
    ReaderPlan,
    Received,
    Watermark,
)
from shared.kafka.wire import Header
from shared.protocol import (
    SCHEMA_VERSION,
    AnyMessage,
    DeadLetter,
    DraftsMessage,
    Heartbeat,
    Hint,
    PlacementsMessage,
    SessionsMessage,
    Topic,
    VerdictsMessage,
    encode,
)
from shared.settings import CommonSettings, KafkaFlavor
from shared.telemetry import LATENCY_BUCKETS_S, TRACEPARENT, TraceContext, current_trace

__all__ = [
    "Bus",
    "Capabilities",
    "GroupReader",
    "MemberNameTaken",
    "Reader",
    "Received",
    "Watermark",
]

MAX_MESSAGE_BYTES: Final = 2 << 20
"""Longest message: a prompt of 128k tokens takes 0.8 MB as JSON."""

BATCH_OVERHEAD_BYTES: Final = 64 << 10
"""What headers, keys and framing may add to a message."""

SEGMENT_BYTES: Final = 64 << 20
"""Kafka forgets whole segments: in small ones, what is old goes soon."""

MAX_HINTS_IN_FLIGHT: Final = 256
"""Hints waiting or unacknowledged before more are dropped: what is older than that many has missed its round."""

HINT_TIMEOUT_S: Final = 2.0
"""A broker that leaves hints unanswered for so long is connected to anew, without them."""

STOP_DEADLINE_S: Final = 5.0
HINT_STOP_S: Final = 1.0
NOT_STARTED: Final = "the bus is not started: use `async with`"

_log = logging.getLogger(__name__)

_SCHEMA: Final[Header] = (SCHEMA_HEADER, SCHEMA_VERSION.encode())


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a broker can do, by its flavour."""

    idempotence: bool
    fetch_max_wait_ms: int
    group_fetch_max_wait_ms: int
    topic_settings: bool

    @classmethod
    def of(cls, flavor: KafkaFlavor) -> Capabilities:
        """Apache Kafka can do everything. Tansu knows no idempotence and does not wake a waiting fetch."""
        if flavor is KafkaFlavor.TANSU:
            return cls(
                idempotence=False, fetch_max_wait_ms=10, group_fetch_max_wait_ms=10, topic_settings=False
            )
        return cls(idempotence=True, fetch_max_wait_ms=500, group_fetch_max_wait_ms=100, topic_settings=True)


@dataclass(frozen=True, slots=True)
class _Metrics:
    sent: Counter
    send_seconds: Histogram
    send_failures: Counter
    received: Counter
    hints_dropped: Counter
    dead_letters: Counter


@cache
def _metrics(registry: CollectorRegistry) -> _Metrics:
    """The bus's metrics, once per registry, however many buses share it."""
    return _Metrics(
        sent=Counter(
            "outrider_bus_sent", "Messages that the broker acknowledged.", ["topic"], registry=registry
        ),
        send_seconds=Histogram(
            "outrider_bus_send_seconds",
            "From send to acknowledgement.",
            ["topic"],
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        ),
        send_failures=Counter(
            "outrider_bus_send_failures",
            "Messages that were not acknowledged in time.",
            ["topic"],
            registry=registry,
        ),
        received=Counter("outrider_bus_received", "Messages read.", ["topic"], registry=registry),
        hints_dropped=Counter(
            "outrider_bus_hints_dropped", "Hints not sent, by reason.", ["reason"], registry=registry
        ),
        dead_letters=Counter(
            "outrider_bus_dead_letters", "Messages that could not be read.", ["topic"], registry=registry
        ),
    )


class ReaderOptions(TypedDict, total=False):
    """How to read explicit partitions: which (by default all), and from which end of the log on."""

    partitions: Sequence[int] | None
    start: Literal["latest", "earliest"]


class GroupOptions(TypedDict):
    """How to read as a member of a group; see `Bus.group_reader`."""

    group: str
    member: NotRequired[str | None]
    session_timeout_s: NotRequired[float]
    on_assigned: NotRequired[PartitionsCallback | None]
    on_revoked: NotRequired[PartitionsCallback | None]


class Bus:
    """The process's connection to Kafka: an async context manager.

    `client` names the process to the broker and in dead letters.
    """

    def __init__(
        self, settings: CommonSettings, *, client: str, registry: CollectorRegistry = REGISTRY
    ) -> None:
        self._settings = settings
        self._client = client
        self._capabilities = Capabilities.of(settings.kafka_flavor)
        self._metrics = _metrics(registry)
        self._sent: dict[Topic, tuple[Counter, Histogram]] = {}
        self._counts: dict[Topic, int] = {}
        # Half of what a message has: a broker that hangs is left for a new connection while there is time for that.
        self._timeout_s = settings.bus_deadline_s / 2
        self._cluster = Cluster(settings.kafka, client=client, timeout_s=self._timeout_s)
        self._producer: Producer | None = None
        self._hints: Producer | None = None
        self._hints_under_way = 0
        self._readers: WeakSet[Reader[Any]] = WeakSet()

    @property
    def capabilities(self) -> Capabilities:
        """What the broker can do."""
        return self._capabilities

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Connect. Raises `BrokerUnavailable` when the broker does not answer within `bus_deadline_s`."""
        try:
            async with asyncio.timeout(self._settings.bus_deadline_s):
                await self._cluster.start()
                await self._look_up_topics()
        except BaseException as error:
            await self.stop()
            if isinstance(error, TimeoutError):
                raise self._unavailable("does not answer") from None
            raise
        self._producer = Producer(
            self._cluster,
            purpose="messages",
            acks=-1,
            idempotent=self._capabilities.idempotence,
            persistent=True,
            timeout_s=self._timeout_s,
        )
        self._hints = Producer(
            self._cluster,
            purpose="hints",
            acks=1,
            idempotent=False,
            persistent=False,
            timeout_s=HINT_TIMEOUT_S,
        )

    async def stop(self) -> None:
        """Stop the readers, wait until everything sent is acknowledged, at most 5 s, and disconnect."""
        await asyncio.gather(*(reader.stop() for reader in tuple(self._readers)))
        producer, self._producer = self._producer, None
        hints, self._hints = self._hints, None
        if hints is not None:
            await hints.stop(HINT_STOP_S)
        if producer is not None and not await producer.stop(STOP_DEADLINE_S):
            _log.error("stopped with messages that the broker did not acknowledge")
        await self._cluster.stop()

    # --- topics -----------------------------------------------------------------------------------------------

    async def ensure_topics(self, topics: Iterable[Topic] = tuple(Topic)) -> None:
        """Create those of `topics` that are missing, and the dead letters. Any number of processes may do so at once.

        A topic that exists keeps the partitions it has. Raises `BrokerUnavailable` past the deadline.
        """
        wanted = {*topics, Topic.DEAD_LETTERS}
        try:
            async with asyncio.timeout(self._settings.bus_deadline_s):
                await self._ensure(wanted)
        except TimeoutError:
            raise self._unavailable(
                f"did not create {', '.join(self._name(each) for each in sorted(wanted - self._counts.keys()))}"
            ) from None

    async def _ensure(self, wanted: set[Topic]) -> None:
        while True:
            try:
                while missing := sorted(wanted - await self._look_up_topics()):
                    await self._cluster.create([self._new_topic(each) for each in missing])
                    await asyncio.sleep(RETRY_S / 2)
                return
            except KafkaError as error:
                _log.debug("topics can't be looked up or created yet: %r", error)
                await asyncio.sleep(RETRY_S)

    def partitions(self, topic: Topic) -> int:
        """How many partitions `topic` has. Raises `BrokerUnavailable` when it does not exist."""
        count = self._counts.get(topic)
        if count is None:
            if self._producer is None:
                raise BrokerUnavailable(NOT_STARTED)
            raise BrokerUnavailable(
                f"Kafka at {self._settings.kafka} has no topic {self._name(topic)}: create it first (`ensure_topics`)"
            )
        return count

    # --- sending ----------------------------------------------------------------------------------------------

    async def send(
        self, message: AnyMessage, *, partition: int | None = None, trace: TraceContext | None = None
    ) -> None:
        """Send, and wait for the acknowledgement; to `partition`, or else to that of the key, which is the session.

        Raises `BrokerUnavailable` past `bus_deadline_s` (the message may then still arrive: readers are ready for
        repeats), `ProtocolError` when it is too long.
        """
        topic = message.topic
        self._check_partition(topic, partition)
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout(self._settings.bus_deadline_s):
                await self._hand_over(self._producer, message, partition, trace)
        except (TimeoutError, KafkaError) as error:
            self._metrics.send_failures.labels(topic).inc()
            if isinstance(error, MessageSizeTooLargeError):
                raise ProtocolError(f"a message for {topic} is longer than the broker takes") from None
            raise self._unavailable(f"did not take a message for {self._name(topic)} ({error!r})") from None
        if topic not in self._sent:
            self._sent[topic] = self._metrics.sent.labels(topic), self._metrics.send_seconds.labels(topic)
        sent, seconds = self._sent[topic]
        sent.inc()
        seconds.observe(loop.time() - started)

    def post(self, message: Hint, *, partition: int, trace: TraceContext | None = None) -> bool:
        """Send a hint without waiting. False when it was dropped: too many are on their way, or the bus has stopped."""
        self._check_partition(message.topic, partition)
        if self._hints is None:
            return False
        if self._hints_under_way >= MAX_HINTS_IN_FLIGHT:
            self._metrics.hints_dropped.labels("full").inc()
            return False
        settled = self._hand_over(self._hints, message, partition, trace)
        self._hints_under_way += 1
        settled.add_done_callback(self._posted)
        return True

    @property
    def hints_under_way(self) -> int:
        """Hints that were posted and neither taken by the broker nor given up yet."""
        return self._hints_under_way

    # --- reading ----------------------------------------------------------------------------------------------

    @overload
    def reader(
        self, topic: Literal[Topic.PLACEMENTS], **options: Unpack[ReaderOptions]
    ) -> Reader[PlacementsMessage]: ...
    @overload
    def reader(self, topic: Literal[Topic.EXITS], **options: Unpack[ReaderOptions]) -> Reader[Hint]: ...
    @overload
    def reader(
        self, topic: Literal[Topic.VERDICTS], **options: Unpack[ReaderOptions]
    ) -> Reader[VerdictsMessage]: ...
    @overload
    def reader(
        self, topic: Literal[Topic.HEARTBEATS], **options: Unpack[ReaderOptions]
    ) -> Reader[Heartbeat]: ...
    @overload
    def reader(self, topic: Topic, **options: Unpack[ReaderOptions]) -> Reader[AnyMessage]: ...

    def reader(self, topic: Topic, **options: Unpack[ReaderOptions]) -> Reader[Any]:
        """A reader of `partitions` (by default all), of what is sent from now on, or from the earliest message on."""
        count = self.partitions(topic)
        partitions = options.get("partitions")
        numbers = range(count) if partitions is None else partitions
        for number in numbers:
            self._check_partition(topic, number)
        plan = self._plan(topic, self._capabilities.fetch_max_wait_ms)
        return Reader(plan, partitions=numbers, end=options.get("start", "latest"))

    @overload
    def group_reader(
        self, topic: Literal[Topic.SESSIONS], **options: Unpack[GroupOptions]
    ) -> GroupReader[SessionsMessage]: ...
    @overload
    def group_reader(
        self, topic: Literal[Topic.DRAFTS], **options: Unpack[GroupOptions]
    ) -> GroupReader[DraftsMessage]: ...
    @overload
    def group_reader(
        self, topic: Literal[Topic.HEARTBEATS], **options: Unpack[GroupOptions]
    ) -> GroupReader[Heartbeat]: ...
    @overload
    def group_reader(self, topic: Topic, **options: Unpack[GroupOptions]) -> GroupReader[AnyMessage]: ...

    def group_reader(self, topic: Topic, **options: Unpack[GroupOptions]) -> GroupReader[Any]:
        """A reader that shares `topic` with the others of `group`, from the earliest message that nobody has done.

        `member` is a name that outlives restarts (static membership): within `session_timeout_s` (6 s) a restart gets
        its partitions back at once and nobody else is disturbed; after it, the others get them. Two processes with one
        name: the earlier one's iteration raises `MemberNameTaken`.
        """
        self.partitions(topic)
        group, member = self._settings.topic_prefix + options["group"], options.get("member")
        timeout_ms = int(options.get("session_timeout_s", 6.0) * 1000)
        reader: GroupReader[Any] = GroupReader(
            self._plan(topic, self._capabilities.group_fetch_max_wait_ms),
            group=group,
            member=member,
            consumer_options={
                "bootstrap_servers": self._settings.kafka,
                "client_id": f"{self._client}-{topic}-member",
                "enable_auto_commit": False,
                "auto_offset_reset": "earliest",
                "session_timeout_ms": timeout_ms,
                # A rebalance is noticed with the next heartbeat: 0.6 s at worst, of the 6 s that it takes anyhow.
                "heartbeat_interval_ms": timeout_ms // 10,
                "retry_backoff_ms": int(RETRY_S * 1000),
                # It fetches nothing: no need to look for work five times a second.
                "consumer_timeout_ms": 60_000,
            },
            on_assigned=options.get("on_assigned"),
            on_revoked=options.get("on_revoked"),
        )
        self._readers.add(reader)
        return reader

    # --- the inside -------------------------------------------------------------------------------------------

    def _name(self, topic: Topic) -> str:
        return self._settings.topic_prefix + topic

    def _check_partition(self, topic: Topic, partition: int | None) -> None:
        count = self.partitions(topic)
        if partition is not None and not 0 <= partition < count:
            raise ValueError(
                f"{self._name(topic)} has no partition {partition}; it has {count}, from 0 to {count - 1}"
            )

    def _unavailable(self, what: str) -> BrokerUnavailable:
        return BrokerUnavailable(
            f"Kafka at {self._settings.kafka} {what} within {self._settings.bus_deadline_s:g} s: check that the "
            "broker runs and that OUTRIDER_KAFKA is its address"
        )

    def _hand_over(
        self,
        producer: Producer | None,
        message: AnyMessage,
        partition: int | None,
        trace: TraceContext | None,
    ) -> asyncio.Future[None]:
        if producer is None:
            raise BrokerUnavailable(NOT_STARTED)
        value, key = encode(message), _key(message)
        if len(value) > (longest := _longest(message.topic)):
            raise ProtocolError(
                f"a message for {message.topic} is too long: {len(value)} bytes, at most {longest} are sent"
            )
        if partition is None:
            partition = (murmur2(key) & 0x7FFFFFFF) % self.partitions(message.topic) if key is not None else 0
        return producer.send(self._name(message.topic), partition, value, key=key, headers=_headers(trace))

    def _posted(self, settled: asyncio.Future[None]) -> None:
        self._hints_under_way -= 1
        if not settled.cancelled() and settled.exception() is not None:
            self._metrics.hints_dropped.labels("failed").inc()

    async def _look_up_topics(self) -> set[Topic]:
        """The topics that exist and can be written to."""
        by_name = {self._name(topic): topic for topic in Topic}
        while True:
            try:
                counts = await self._cluster.look_up(by_name)
            except KafkaError as error:
                _log.debug("topics are not known: %r", error)
                await asyncio.sleep(RETRY_S)
            else:
                self._counts.update((by_name[name], count) for name, count in counts.items())
                return set(self._counts)

    def _new_topic(self, topic: Topic) -> NewTopic:
        settings = self._settings
        counts = {
            Topic.DRAFTS: settings.drafts_partitions,
            Topic.EXITS: settings.reply_partitions,
            Topic.VERDICTS: settings.reply_partitions,
            Topic.DEAD_LETTERS: 1,
        }
        configs = {
            "max.message.bytes": str(_longest(topic) + BATCH_OVERHEAD_BYTES),
            "min.insync.replicas": str(max(1, settings.replication_factor - 1)),
        }
        if topic is not Topic.DEAD_LETTERS:
            # Redis holds what matters of a session; a message older than its session is of no use.
            configs["retention.ms"] = str(int(settings.session_ttl_s * 1000))
            configs["segment.bytes"] = str(SEGMENT_BYTES)
        return NewTopic(
            self._name(topic),
            counts.get(topic, settings.sessions_partitions),
            settings.replication_factor,
            topic_configs=configs if self._capabilities.topic_settings else {},
        )

    def _plan(self, topic: Topic, fetch_wait_ms: int) -> ReaderPlan:
        return ReaderPlan(
            topic=topic,
            name=self._name(topic),
            reader=self._client,
            cluster=self._cluster,
            deadline_s=self._settings.bus_deadline_s,
            queue=self._settings.bus_queue,
            fetch_wait_ms=fetch_wait_ms,
            fetch_partition_bytes=MAX_MESSAGE_BYTES,
            fetch_timeout_s=self._timeout_s,
            send_dead_letter=self._send_dead_letter,
            received=self._metrics.received.labels(topic),
            dead_letters=self._metrics.dead_letters.labels(topic),
        )

    async def _send_dead_letter(self, letter: DeadLetter) -> None:
        await self.send(letter, partition=0)


def _longest(topic: Topic) -> int:
    """The longest message of a topic, bytes; a dead letter holds one as base64."""
    return MAX_MESSAGE_BYTES * 3 // 2 if topic is Topic.DEAD_LETTERS else MAX_MESSAGE_BYTES


def _key(message: AnyMessage) -> bytes | None:
    match message:
        case Heartbeat():
            return message.verifier.encode()
        case DeadLetter():
            return None
        case _:
            return message.session.encode()


def _headers(trace: TraceContext | None) -> list[Header]:
    trace = trace or current_trace.get()
    return [_SCHEMA] if trace is None else [_SCHEMA, (TRACEPARENT, trace.to_header().encode())]
