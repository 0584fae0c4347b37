"""A typed asyncio bus over Kafka: messages of `shared.protocol` in and out, with what the services may rely on.

`send` returns when the broker has the message for good; `post` is for hints, which may be lost and must never be in a
verdict's way; readers are those of `shared.reader`. What travels beside a message: the schema's version and the trace.

Why the clients are set as they are (aiokafka 0.14 and Apache Kafka on two busy cores; one way, sender to reader):
- `linger_ms=0`, no compression: a message leaves at once; a block of 8 tokens is 200 bytes.
- Verdicts and hints have a producer each, with a connection each: aiokafka keeps one produce request in flight per
  broker, so that behind a hint a verdict would wait for the hint's acknowledgement.
- Readers have a consumer per topic, for the same reason: one fetch is in flight per consumer and broker.
- `acks=all` with idempotence costs nothing on a single broker, and a retry after a lost connection repeats nothing.
- `fetch_max_wait_ms=100`: Apache Kafka answers a waiting fetch the moment a message arrives, so this is only how often
  an idle reader asks anew, and how long a partition just won may wait behind the fetch before it.
- `auto_offset_reset="earliest"`: when a position has left the log, what is still there is read, not skipped.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, Final, Literal, NotRequired, Self, TypedDict, Unpack, overload

from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import (
    InvalidProducerEpoch,
    KafkaError,
    MessageSizeTooLargeError,
    NoError,
    OutOfOrderSequenceNumber,
    ProducerClosed,
    ProducerFenced,
    TopicAlreadyExistsError,
    UnknownProducerId,
    for_code,
)
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram

from shared.errors import BrokerUnavailable, ProtocolError
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
from shared.reader import (
    SCHEMA_HEADER,
    GroupReader,
    MemberNameTaken,
    PartitionsCallback,
    Reader,
    ReaderPlan,
    Received,
    Watermark,
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
"""Longest message: a prompt of 128k tokens takes 0.8 MB as JSON; a dead letter is a third longer than its original."""

MAX_HINTS_IN_FLIGHT: Final = 256
"""Hints waiting or unacknowledged before more are dropped: what is older than that many has missed its round."""

HINT_TTL_MS: Final = 2000
"""A hint undelivered for so long is given up."""

FETCH_MAX_BYTES: Final = 8 << 20
"""What a reader holds at most beside the messages that it has handed out."""

STOP_DEADLINE_S: Final = 5.0
RETRY_S: Final = 0.1

_log = logging.getLogger(__name__)

# A producer that has met one of these delivers nothing more to the partition; a new one does.
_PRODUCER_BROKEN = (
    InvalidProducerEpoch,
    OutOfOrderSequenceNumber,
    ProducerClosed,
    ProducerFenced,
    UnknownProducerId,
)

_Header = tuple[str, bytes]
_SCHEMA: Final[_Header] = (SCHEMA_HEADER, SCHEMA_VERSION.encode())


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a broker can do, by its flavour."""

    idempotence: bool
    fetch_max_wait_ms: int
    topic_settings: bool

    @classmethod
    def of(cls, flavor: KafkaFlavor) -> Capabilities:
        """Apache Kafka can do everything. Tansu knows no idempotence and does not wake a waiting fetch."""
        if flavor is KafkaFlavor.TANSU:
            return cls(idempotence=False, fetch_max_wait_ms=10, topic_settings=False)
        return cls(idempotence=True, fetch_max_wait_ms=100, topic_settings=True)


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
        self._counts: dict[Topic, int] = {}
        self._producer: AIOKafkaProducer | None = None
        self._replacing = asyncio.Lock()
        self._hints: _HintSender | None = None

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
                self._producer = await self._connect(self._new_producer)
                self._hints = _HintSender(await self._connect(self._new_hint_producer), self._metrics)
                await self._look_up_topics()
        except BaseException as error:
            await self.stop()
            if isinstance(error, TimeoutError):
                raise self._unavailable("does not answer") from None
            raise

    async def stop(self) -> None:
        """Wait until everything sent is acknowledged, at most 5 s, and disconnect."""
        hints, self._hints = self._hints, None
        producer, self._producer = self._producer, None
        if hints is not None:
            await hints.stop()
        if producer is not None and not await _stop_producer(producer):
            _log.error("stopped with messages that the broker did not acknowledge")

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
                    await self._create(missing)
                return
            except KafkaError as error:
                _log.debug("topics can't be looked up or created yet: %r", error)
                await asyncio.sleep(RETRY_S)

    def partitions(self, topic: Topic) -> int:
        """How many partitions `topic` has. Raises `BrokerUnavailable` when it does not exist."""
        count = self._counts.get(topic)
        if count is None:
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
        started = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._settings.bus_deadline_s):
                await self._deliver(message, partition, _headers(trace))
        except (TimeoutError, KafkaError) as error:
            self._metrics.send_failures.labels(topic).inc()
            if isinstance(error, MessageSizeTooLargeError):
                raise ProtocolError(f"a message for {topic} is too long: {error}") from None
            raise self._unavailable(f"did not take a message for {self._name(topic)} ({error!r})") from None
        self._metrics.sent.labels(topic).inc()
        self._metrics.send_seconds.labels(topic).observe(asyncio.get_running_loop().time() - started)

    def post(self, message: Hint, *, partition: int, trace: TraceContext | None = None) -> bool:
        """Send a hint without waiting. False when it was dropped: too many are on their way, or the bus has stopped."""
        self._check_partition(message.topic, partition)
        if self._hints is None:
            return False
        return self._hints.post(
            _Post(self._name(message.topic), encode(message), _key(message), partition, _headers(trace))
        )

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
        return Reader(
            self._plan(topic), partitions=numbers, from_end=options.get("start", "latest") == "latest"
        )

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
        plan = self._plan(
            topic,
            group_id=group,
            group_instance_id=member,
            session_timeout_ms=timeout_ms,
            heartbeat_interval_ms=timeout_ms // 10,
        )
        return GroupReader(
            plan,
            member=member,
            group_members=lambda: self._group_members(group),
            on_assigned=options.get("on_assigned"),
            on_revoked=options.get("on_revoked"),
        )

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

    def _new_producer(self) -> AIOKafkaProducer:
        return AIOKafkaProducer(
            bootstrap_servers=self._settings.kafka,
            client_id=self._client,
            acks="all",
            enable_idempotence=self._capabilities.idempotence,
            linger_ms=0,
            max_batch_size=64 << 10,
            max_request_size=MAX_MESSAGE_BYTES,
            # A broker that hangs is given up for a new connection while there is still time for that.
            request_timeout_ms=int(self._settings.bus_deadline_s * 500),
            retry_backoff_ms=int(RETRY_S * 1000),
        )

    def _new_hint_producer(self) -> AIOKafkaProducer:
        return AIOKafkaProducer(
            bootstrap_servers=self._settings.kafka,
            client_id=f"{self._client}-hints",
            acks=1,
            linger_ms=0,
            max_batch_size=64 << 10,
            request_timeout_ms=HINT_TTL_MS,
            retry_backoff_ms=int(RETRY_S * 1000),
        )

    async def _connect(self, new: Callable[[], AIOKafkaProducer]) -> AIOKafkaProducer:
        """A started producer; tries until it is cancelled."""
        while True:
            producer = new()
            try:
                await producer.start()
            except (KafkaError, OSError) as error:
                _log.debug("Kafka at %s: %r", self._settings.kafka, error)
                await _stop_producer(producer)
                await asyncio.sleep(RETRY_S)
            except BaseException:
                await _stop_producer(producer)
                raise
            else:
                return producer

    async def _deliver(self, message: AnyMessage, partition: int | None, headers: list[_Header]) -> None:
        name, value, key = self._name(message.topic), encode(message), _key(message)
        while True:
            producer = self._producer
            if producer is None:
                raise BrokerUnavailable("the bus is not started: use `async with`")
            try:
                await (await producer.send(name, value, key=key, partition=partition, headers=headers))
                return
            except _PRODUCER_BROKEN as error:
                await self._replace(producer, error)

    async def _replace(self, broken: AIOKafkaProducer, error: KafkaError) -> None:
        async with self._replacing:
            if self._producer is not broken:
                return
            _log.warning("the producer is replaced after %r", error)
            self._producer = await self._connect(self._new_producer)
            await _stop_producer(broken)

    def _admin(self) -> AIOKafkaAdminClient:
        return AIOKafkaAdminClient(
            bootstrap_servers=self._settings.kafka,
            client_id=f"{self._client}-admin",
            request_timeout_ms=int(self._settings.bus_deadline_s * 1000),
        )

    async def _look_up_topics(self) -> set[Topic]:
        """The topics that exist and can be written to."""
        async with _started(self._admin()) as admin:
            described = await admin.describe_topics([self._name(topic) for topic in Topic])
        by_name = {self._name(topic): topic for topic in Topic}
        for each in described:
            partitions = each["partitions"]
            if each["error_code"] == 0 and partitions and all(part["leader"] >= 0 for part in partitions):
                self._counts[by_name[each["topic"]]] = len(partitions)
        return set(self._counts)

    async def _create(self, topics: Sequence[Topic]) -> None:
        async with _started(self._admin()) as admin:
            response = await admin.create_topics([self._new_topic(topic) for topic in topics])
        for name, code, *text in response.topic_errors:
            if for_code(code) not in (NoError, TopicAlreadyExistsError):
                raise BrokerUnavailable(
                    f"Kafka at {self._settings.kafka} can't create {name}: {for_code(code).__name__} {text}"
                )
        await asyncio.sleep(RETRY_S / 2)

    def _new_topic(self, topic: Topic) -> NewTopic:
        settings = self._settings
        counts = {
            Topic.DRAFTS: settings.drafts_partitions,
            Topic.EXITS: settings.reply_partitions,
            Topic.VERDICTS: settings.reply_partitions,
            Topic.DEAD_LETTERS: 1,
        }
        configs = {"max.message.bytes": str(MAX_MESSAGE_BYTES)} if self._capabilities.topic_settings else {}
        return NewTopic(
            self._name(topic),
            counts.get(topic, settings.sessions_partitions),
            settings.replication_factor,
            topic_configs=configs,
        )

    def _plan(self, topic: Topic, **options: object) -> ReaderPlan:
        return ReaderPlan(
            topic=topic,
            name=self._name(topic),
            reader=self._client,
            address=self._settings.kafka,
            deadline_s=self._settings.bus_deadline_s,
            queue=self._settings.bus_queue,
            options={
                "bootstrap_servers": self._settings.kafka,
                "client_id": f"{self._client}-{topic}",
                "enable_auto_commit": False,
                "auto_offset_reset": "earliest",
                "fetch_max_wait_ms": self._capabilities.fetch_max_wait_ms,
                "fetch_max_bytes": FETCH_MAX_BYTES,
                "max_partition_fetch_bytes": MAX_MESSAGE_BYTES,
                "retry_backoff_ms": int(RETRY_S * 1000),
                **options,
            },
            send_dead_letter=self._send_dead_letter,
            received=self._metrics.received.labels(topic),
            dead_letters=self._metrics.dead_letters.labels(topic),
        )

    async def _send_dead_letter(self, letter: DeadLetter) -> None:
        await self.send(letter, partition=0)

    async def _group_members(self, group: str) -> frozenset[str]:
        async with _started(self._admin()) as admin:
            responses = await admin.describe_consumer_groups([group])
        return frozenset(
            member[0]
            for response in responses
            for description in response.groups
            for member in description[5]
        )


@dataclass(frozen=True, slots=True)
class _Post:
    topic: str
    payload: bytes
    key: bytes | None
    partition: int
    headers: list[_Header]


class _HintSender:
    """Sends hints from a queue of its own, over a producer of its own, and drops what does not fit in."""

    def __init__(self, producer: AIOKafkaProducer, metrics: _Metrics) -> None:
        self._producer = producer
        self._metrics = metrics
        self._waiting: deque[_Post] = deque()
        self._wake = asyncio.Event()
        self._in_flight = 0
        self._stopping = False
        self._task = asyncio.create_task(self._run(), name="send hints")

    def post(self, post: _Post) -> bool:
        """Queue it, or drop it when too many wait or are unacknowledged."""
        if len(self._waiting) + self._in_flight >= MAX_HINTS_IN_FLIGHT:
            self._metrics.hints_dropped.labels("full").inc()
            return False
        self._waiting.append(post)
        self._wake.set()
        return True

    async def stop(self) -> None:
        """Send what is queued, if the broker takes it in time."""
        self._stopping = True
        self._wake.set()
        await asyncio.wait([self._task], timeout=STOP_DEADLINE_S)
        self._task.cancel()
        await asyncio.wait([self._task])
        await _stop_producer(self._producer)

    async def _run(self) -> None:
        while self._waiting or not self._stopping:
            self._wake.clear()
            while self._waiting:
                await self._send(self._waiting.popleft())
            if not self._stopping:
                await self._wake.wait()

    async def _send(self, post: _Post) -> None:
        self._in_flight += 1
        try:
            sent = await self._producer.send(
                post.topic, post.payload, key=post.key, partition=post.partition, headers=post.headers
            )
        except KafkaError as error:
            self._settled(error)
        except BaseException:
            self._in_flight -= 1
            raise
        else:
            sent.add_done_callback(lambda done: self._settled(None if done.cancelled() else done.exception()))

    def _settled(self, error: BaseException | None) -> None:
        self._in_flight -= 1
        if error is not None:
            self._metrics.hints_dropped.labels("failed").inc()
            _log.debug("hint not sent: %r", error)


def _key(message: AnyMessage) -> bytes | None:
    match message:
        case Heartbeat():
            return message.verifier.encode()
        case DeadLetter():
            return None
        case _:
            return message.session.encode()


def _headers(trace: TraceContext | None) -> list[_Header]:
    trace = trace or current_trace.get()
    return [_SCHEMA] if trace is None else [_SCHEMA, (TRACEPARENT, trace.to_header().encode())]


@asynccontextmanager
async def _started(admin: AIOKafkaAdminClient) -> AsyncIterator[AIOKafkaAdminClient]:
    try:
        await admin.start()
        yield admin
    finally:
        await admin.close()


async def _stop_producer(producer: AIOKafkaProducer) -> bool:
    """Flush and close, without waiting long for a broker that may be gone. False when something was left unsent."""
    try:
        async with asyncio.timeout(STOP_DEADLINE_S):
            await producer.stop()
    except (TimeoutError, KafkaError):
        await producer.client.close()
        return False
    return True
