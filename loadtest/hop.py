"""What the path around the model costs, hop by hop: `scripts/bench hop`.

One session after another sends blocks through the real uplink, broker, verifier service and store to an engine whose
pass is a timer, and waits for each verdict. The overhead of a round is the time from sending the block to having its
verdict, less the timer's nominal time: whatever the timer overran counts as overhead. Both processes read the same
monotonic clock, so that the overhead splits into hops:

    up        the block's way to the verifier (Kafka, acks=all)
    dispatch  from there to the engine
    timer     what the pass took beyond its nominal time
    commit    compare and append in Redis
    down      the verdict's way back

The broker alone is measured beside it, in the same rhythm: a message to oneself, there and back again (twice, as block and
verdict). What waits longest between two messages gets coldest: the same code takes 2.9 ms after a pass of 2 ms and 4.5 ms
after one of 20 ms on a machine that others share, so several lengths of a pass are measured. The first is the headline.

`hop.json` holds `{"kafka", "timer_ms", "rounds", "overhead_ms": {"p50", "p95", "p99"}, "hops_ms": {hop: {...}}, "broker_ms",
"overhead_p50_by_batch_ms", "longer_passes": {timer_ms: {...}}}`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import uvloop
from pydantic import SecretStr

from loadtest.timer_verifier import TIMER_LOG, TIMER_MS
from services.draft_gateway.kafka_uplink import KafkaUplink
from services.draft_gateway.uplink import SessionMessage
from shared.bus import Bus
from shared.errors import InvalidRequest, Unavailable
from shared.protocol import (
    Block,
    GenerationParams,
    Heartbeat,
    OpenSession,
    Policy,
    Prompt,
    Topic,
    Verdict,
)
from shared.settings import CommonSettings
from shared.stack.kafka import find_kafka
from shared.stack.processes import ManagedProcess
from shared.stack.redis import find_redis
from shared.store import Store

HOPS = ("up", "dispatch", "timer", "commit", "down")
BLOCK = (5, 6, 7, 8, 9)
ANSWER_DEADLINE_S = 10.0
START_DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured: `batches` sessions of `rounds` rounds each, each after `settle` rounds that don't count.

    A batch that doesn't count goes before them: a broker that has just started runs interpreted.
    """

    batches: int = 5
    rounds: int = 200
    settle: int = 20
    timer_ms: float = 5.0
    kafka: str = "apache"


@dataclass(frozen=True, slots=True)
class Report:
    """What `hop.json` holds; times in ms."""

    kafka: str
    timer_ms: float
    rounds: int
    overhead_ms: Mapping[str, float]
    overhead_p50_by_batch_ms: Sequence[float]
    hops_ms: Mapping[str, Mapping[str, float]]
    broker_ms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Round:
    """One round as its sender saw it; times in ms on the monotonic clock."""

    session: str
    base: int
    sent_ms: float
    received_ms: float
    verify_ms: float
    commit_ms: float


class _Session:
    """A gateway's end of one session: sends, waits for the verdict."""

    def __init__(self, session: str, uplink: KafkaUplink, partition: int) -> None:
        self.session = session
        self._uplink = uplink
        self._partition = partition
        self._answers: asyncio.Queue[tuple[float, Verdict]] = asyncio.Queue(maxsize=16)
        self._base = 0
        self._round = 0
        uplink.subscribe(session, self._receive)

    def _receive(self, message: SessionMessage) -> None:
        if isinstance(message, Verdict):
            self._answers.put_nowait((time.monotonic() * 1000, message))

    async def start(self) -> None:
        """Prefill; the verifier may still be starting, which the prompt waits for in its topic."""
        prompt = Prompt(session=self.session, epoch=1, reply=self._uplink.reply)
        await self._uplink.send(prompt, partition=self._partition)
        await self._answer(START_DEADLINE_S)

    async def round(self) -> Round:
        """Send a block and wait for its verdict."""
        base, self._round = self._base, self._round + 1
        block = Block(
            session=self.session,
            epoch=1,
            reply=self._uplink.reply,
            round=self._round,
            base=base,
            tokens=BLOCK,
        )
        sent_ms = time.monotonic() * 1000
        sending = asyncio.create_task(self._uplink.send(block, partition=self._partition))
        received_ms, verdict = await self._answer()
        await sending
        return Round(self.session, base, sent_ms, received_ms, verdict.verify_ms, verdict.commit_ms)

    async def _answer(self, deadline_s: float = ANSWER_DEADLINE_S) -> tuple[float, Verdict]:
        try:
            async with asyncio.timeout(deadline_s):
                received_ms, verdict = await self._answers.get()
        except TimeoutError:
            raise Unavailable(f"no verdict within {deadline_s:g} s; see the verifier's log") from None
        self._base = verdict.base + len(verdict.tokens)
        return received_ms, verdict


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99, rounded to µs."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49], 3), "p95": round(cuts[94], 3), "p99": round(cuts[98], 3)}


def split(
    rounds: Iterable[Round], passes: Mapping[tuple[str, int], Mapping[str, float]], timer_ms: float
) -> dict[str, list[float]]:
    """Each round's overhead and hops, ms; rounds whose pass was not logged are left out."""
    split_ms: dict[str, list[float]] = {"overhead": [], **{hop: [] for hop in HOPS}}
    for done in rounds:
        ran = passes.get((done.session, done.base))
        if ran is None:
            continue
        ended_ms = ran["ended_ms"]
        arrived_ms = ended_ms - done.verify_ms
        split_ms["overhead"].append(done.received_ms - done.sent_ms - timer_ms)
        split_ms["up"].append(arrived_ms - done.sent_ms)
        split_ms["dispatch"].append(ran["submitted_ms"] - arrived_ms)
        split_ms["timer"].append(ended_ms - ran["submitted_ms"] - timer_ms)
        split_ms["commit"].append(done.commit_ms)
        split_ms["down"].append(done.received_ms - ended_ms - done.commit_ms)
    return split_ms


async def measure_broker(settings: CommonSettings, options: Options) -> list[float]:
    """Twice the way of a message through the broker to oneself, ms; `options.rounds` of them, a pass apart."""
    beat = Heartbeat(
        verifier="hop", incarnation="hop", model="timer", ready=False, partitions=(), sessions=0, max_sessions=0,
        kv_usage=0.0, kv_capacity_tokens=0, max_model_len=0,
    )  # fmt: skip
    taken_ms = []
    async with Bus(settings, client="hop-broker") as bus:
        await bus.ensure_topics([Topic.HEARTBEATS])
        async with bus.reader(Topic.HEARTBEATS) as reader:
            for _ in range(options.settle + options.rounds):
                sent_ms = time.monotonic() * 1000
                sending = asyncio.create_task(bus.send(beat, partition=0))
                async for received in reader:
                    if received.message.incarnation == beat.incarnation:
                        break
                taken_ms.append(2 * (time.monotonic() * 1000 - sent_ms))
                await sending
                await asyncio.sleep(options.timer_ms / 1000)
    return taken_ms[options.settle :]


async def measure(settings: CommonSettings, options: Options) -> list[Round]:
    """Send the blocks of `options.batches` sessions, one after another, through a verifier that is already there."""
    uplink = KafkaUplink(settings, name="hop", lease_s=5.0)
    await uplink.start()
    try:
        async with Store(settings) as store:
            rounds: list[Round] = []
            for batch in range(options.batches + 1):
                measured = await _batch(store, uplink, f"hop-{time.time_ns()}-{batch}", options)
                rounds.extend(measured if batch else [])
            return rounds
    finally:
        await uplink.stop()


async def _batch(store: Store, uplink: KafkaUplink, name: str, options: Options) -> list[Round]:
    count = options.rounds + options.settle
    opened = OpenSession(
        session=name,
        reply=uplink.reply,
        model="timer",
        prompt=(1, 2, 3),
        params=GenerationParams(max_tokens=(count + 2) * (len(BLOCK) + 1), policy=Policy.COST),
    )
    await store.create(opened, verifier="timer", partition=0)
    session = _Session(name, uplink, 0)
    await session.start()
    rounds = [await session.round() for _ in range(count)]
    return rounds[options.settle :]


def report(
    rounds: Sequence[Round],
    passes: Mapping[tuple[str, int], Mapping[str, float]],
    options: Options,
    broker_ms: Sequence[float],
) -> Report:
    """The figures of all rounds, and the spread of the batches' medians."""
    split_ms = split(rounds, passes, options.timer_ms)
    sessions = sorted({done.session for done in rounds})
    medians = [
        statistics.median(
            split([d for d in rounds if d.session == name], passes, options.timer_ms)["overhead"]
        )
        for name in sessions
    ]
    return Report(
        kafka=options.kafka,
        timer_ms=options.timer_ms,
        rounds=len(split_ms["overhead"]),
        overhead_ms=percentiles(split_ms["overhead"]),
        overhead_p50_by_batch_ms=[round(median, 3) for median in medians],
        hops_ms={hop: percentiles(split_ms[hop]) for hop in HOPS},
        broker_ms=percentiles(broker_ms),
    )


def read_passes(path: Path) -> dict[tuple[str, int], dict[str, float]]:
    """What the timer logged, by session and base."""
    passes: dict[tuple[str, int], dict[str, float]] = {}
    for line in path.read_text().splitlines():
        ran = json.loads(line)
        passes[ran["session"], ran["base"]] = ran
    return passes


# --- running it ---------------------------------------------------------------------------------------


@contextmanager
def parts(
    folder: Path, options: Options, kafka: str | None, redis: str | None
) -> Iterator[tuple[CommonSettings, Path, str]]:
    """Broker, store and the verifier around a timer, as processes; their settings, the timer's log, the broker's name."""
    broker = find_kafka(folder / "kafka", address=kafka, die_with_parent=True)
    store = find_redis(folder / "redis", url=redis, die_with_parent=True)
    broker.start()
    try:
        store.start()
        environment = {
            "OUTRIDER_KAFKA": broker.bootstrap,
            "OUTRIDER_KAFKA_FLAVOR": broker.flavor.value,
            "OUTRIDER_REDIS_URL": store.url,
            "OUTRIDER_TOPIC_PREFIX": f"hop-{time.time_ns()}-",
        }
        settings = CommonSettings(
            kafka=broker.bootstrap,
            kafka_flavor=broker.flavor,
            redis_url=SecretStr(store.url),
            topic_prefix=environment["OUTRIDER_TOPIC_PREFIX"],
        )
        log = folder / "timer.log"
        verifier = _verifier(folder, environment, log, options)
        verifier.start()
        try:
            yield settings, log, f"{broker.flavor.value}"
        finally:
            verifier.stop()
    finally:
        store.stop()
        broker.stop()


def _verifier(folder: Path, environment: Mapping[str, str], log: Path, options: Options) -> ManagedProcess:
    return ManagedProcess(
        name="timer-verifier",
        command=[sys.executable, "-m", "loadtest.timer_verifier"],
        log=folder / "verifier.log",
        environment={
            **environment,
            TIMER_LOG: str(log),
            TIMER_MS: str(options.timer_ms),
            "OUTRIDER_MODEL": "timer",
            "OUTRIDER_VERIFIER_PORT": "0",
        },
        die_with_parent=True,
    )


def show(found: Report) -> str:
    """The report as lines for a person."""
    lines = [
        f"kafka: {found.kafka}; {found.rounds} rounds; the timer's {found.timer_ms:g} ms are taken off",
        f"{'':10}{'p50':>9}{'p95':>9}{'p99':>9}  ms",
    ]
    for name, figures in (
        ("overhead", found.overhead_ms),
        *found.hops_ms.items(),
        ("broker", found.broker_ms),
    ):
        lines.append(f"{name:10}" + "".join(f"{figures[key]:9.2f}" for key in ("p50", "p95", "p99")))
    batches = ", ".join(f"{median:.2f}" for median in found.overhead_p50_by_batch_ms)
    share = found.overhead_ms["p50"] / found.broker_ms["p50"]
    return "\n".join(
        [*lines, f"p50 of each batch: {batches}; {share:.2f} x the broker alone, there and back"]
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--out", type=Path, help="folder for hop.json")
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=200, help="rounds a batch")
    parser.add_argument(
        "--timer-ms", default="5,20", help="what a pass takes; several with commas, the headline first"
    )
    parser.add_argument("--kafka", help="address of a broker that runs already")
    parser.add_argument("--redis", help="URL of a Redis that runs already")


async def _measure_all(settings: CommonSettings, options: Options) -> tuple[list[Round], list[float]]:
    return await measure(settings, options), await measure_broker(settings, options)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    try:
        timers_ms = [float(part) for part in arguments.timer_ms.split(",")]
    except ValueError:
        raise InvalidRequest(
            f"--timer-ms: {arguments.timer_ms!r} should be ms, several with commas"
        ) from None
    reports = []
    for timer_ms in timers_ms:
        options = Options(batches=arguments.batches, rounds=arguments.rounds, timer_ms=timer_ms)
        with tempfile.TemporaryDirectory(prefix="outrider-hop-") as folder:
            with parts(Path(folder), options, arguments.kafka, arguments.redis) as (settings, log, kafka):
                rounds, broker_ms = uvloop.run(_measure_all(settings, options))
            reports.append(report(rounds, read_passes(log), replace(options, kafka=kafka), broker_ms))
        print(show(reports[-1]), flush=True)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        headline, *longer = reports
        held = asdict(headline) | {"longer_passes": {f"{each.timer_ms:g}": asdict(each) for each in longer}}
        (arguments.out / "hop.json").write_text(json.dumps(held, indent=1) + "\n")
    return 0
