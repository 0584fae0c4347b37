"""What the path around the model costs, hop by hop: `scripts/bench hop`.

One session after another sends blocks through the real uplink, broker, verifier service and store to an engine whose pass is
a timer, and waits for each verdict. The overhead of a round is the time from sending the block to having its verdict, less the
timer's nominal time: whatever the timer overran counts as overhead. Both processes read the same monotonic clock, so that
the overhead splits into hops:

    up        the block's way to the verifier (Kafka, acks=all)
    dispatch  from there to the engine
    timer     what the pass took beyond its nominal time
    commit    compare and append in Redis
    down      the verdict's way back

`hop.json` holds `{"kafka", "timer_ms", "rounds", "batches", "overhead_ms": {"p50", "p95", "p99"}, "hops_ms": {hop: {...}}}`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtest.timer_verifier import TIMER_LOG, TIMER_MS
from services.draft_gateway.uplink import KafkaUplink, SessionMessage
from shared.errors import OutriderError, Unavailable
from shared.protocol import Block, GenerationParams, OpenSession, Prompt, Verdict
from shared.settings import CommonSettings
from shared.store import Store

HOPS = ("up", "dispatch", "timer", "commit", "down")
BLOCK = (5, 6, 7, 8, 9)
ANSWER_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured: `batches` sessions of `rounds` rounds each, after `warmup` rounds that don't count."""

    batches: int = 5
    rounds: int = 200
    warmup: int = 20
    timer_ms: float = 20.0
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
        """Prefill."""
        prompt = Prompt(session=self.session, epoch=1, reply=self._uplink.reply)
        await self._uplink.send(prompt, partition=self._partition)
        await self._answer()

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

    async def _answer(self) -> tuple[float, Verdict]:
        try:
            received_ms, verdict = await asyncio.wait_for(self._answers.get(), ANSWER_DEADLINE_S)
        except TimeoutError:
            raise Unavailable(f"no verdict within {ANSWER_DEADLINE_S:g} s; see the verifier's log") from None
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


async def measure(settings: CommonSettings, options: Options) -> list[Round]:
    """Send the blocks of `options.batches` sessions, one after another, through a verifier that is already there."""
    uplink = KafkaUplink(settings, name="hop", lease_s=5.0)
    await uplink.start()
    try:
        async with Store(settings) as store:
            rounds: list[Round] = []
            for batch in range(options.batches):
                rounds.extend(await _batch(store, uplink, f"hop-{time.time_ns()}-{batch}", options))
            return rounds
    finally:
        await uplink.stop()


async def _batch(store: Store, uplink: KafkaUplink, name: str, options: Options) -> list[Round]:
    count = options.rounds + options.warmup
    opened = OpenSession(
        session=name,
        reply=uplink.reply,
        model="timer",
        prompt=(1, 2, 3),
        params=GenerationParams(max_tokens=(count + 2) * (len(BLOCK) + 1)),
    )
    await store.create(opened, verifier="timer", partition=0)
    session = _Session(name, uplink, 0)
    await session.start()
    rounds = [await session.round() for _ in range(count)]
    return rounds[options.warmup :]


def report(
    rounds: Sequence[Round], passes: Mapping[tuple[str, int], Mapping[str, float]], options: Options
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
    )


def read_passes(path: Path) -> dict[tuple[str, int], dict[str, float]]:
    """What the timer logged, by session and base."""
    passes: dict[tuple[str, int], dict[str, float]] = {}
    for line in path.read_text().splitlines():
        ran = json.loads(line)
        passes[ran["session"], ran["base"]] = ran
    return passes
