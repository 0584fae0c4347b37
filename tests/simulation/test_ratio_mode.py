"""Ratio mode through both sides of the core: whatever lanes, forwards, hints, the floor and late blocks do, what is said is
distributed as the target says.

Edge and verifier of one session talk over links of random delay; draft and target are tables over three tokens. Some
thousand sessions are played, and their answers compared with the target's own probabilities. The verifier goes on by
itself, so that blocks come late and are trimmed; hints know the verdict of the block that they speak of.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from shared.protocol import (
    Block,
    FinishReason,
    Forward,
    Hint,
    Outcome,
    Policy,
    Prompt,
    ReplyRoute,
    Sampling,
    SamplingMode,
    Tokens,
)
from shared.sampling.conformal import ConformalRule
from shared.sampling.ratio import draft_token, judge
from shared.sampling.rules import Row, Rules
from shared.sampling.sparse import SparseRow, encode
from shared.speculation import edge, verifier

V = 3
LENGTH = 4
SESSIONS = 6000
ROUTE = ReplyRoute(gateway="g", partition=0)
RULE = ConformalRule(target=0.05, rate=0.1, first=0.02, highest=0.2)
TARGET = np.random.default_rng(3).standard_normal((V + 1, V)).astype(np.float32) * 1.3
DRAFT = TARGET + np.array([1.2, 0.0, -0.3], dtype=np.float32)
"""It says token 0 too often."""
CONFIG = edge.EdgeConfig(
    gateway="g",
    max_tokens=LENGTH,
    block_length=2,
    policy=Policy.LATENCY,
    guesses=True,
    forwards=True,
    lane_threshold=0.02,
    forwards_per_token=4.0,
)

Logits = npt.NDArray[np.float32]


@dataclass
class Play:
    """One session: both sides, the engine between, and what is on its way."""

    number: int
    told: Callable[[tuple[SparseRow, ...]], tuple[SparseRow, ...]] = tuple
    """What the verifier is told of the rows that a block was drawn from."""
    now_ms: float = 0.0
    said: Tokens = ()
    finished: bool = False
    kinds: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rules = Rules(Sampling(temperature=1.0, seed=5, choice=self.number, mode=SamplingMode.RATIO), 0)
        self.chance = Random(self.number)
        self.edge = edge.EdgeSession(CONFIG)
        self.verifier = verifier.VerifierSession("s", max_block=4)
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.ways: dict[str, float] = {}
        self.draft_ms = self.chance.choice((0.1, 0.5, 3.0))

    def later(self, mean_ms: float, do: Callable[[], None], way: str = "") -> None:
        """Do something after a random time; what goes the same `way` stays in order."""
        at = self.now_ms + self.chance.expovariate(1 / mean_ms)
        if way:
            at = self.ways[way] = max(at, self.ways.get(way, 0.0))
        heapq.heappush(self.queue, (at, next(self.order), do))

    def run(self) -> Tokens:
        self.on_edge(edge.Opened(epoch=1))
        for _ in range(2000):
            if self.finished or not self.queue:
                break
            self.now_ms, _, do = heapq.heappop(self.queue)
            do()
        assert self.finished, "the session came to a stop"
        return self.edge.committed

    # --- the edge ---

    def on_edge(self, event: edge.EdgeEvent) -> None:
        for action in self.edge.handle(event, self.now_ms):
            self.kinds[type(action).__name__] += 1
            match action:
                case edge.SendPrompt():
                    self.up(Prompt(session="s", epoch=1, reply=ROUTE))
                case edge.SendBlock():
                    q = encode(action.rows, action.tokens)
                    self.up(
                        Block(
                            session="s",
                            epoch=1,
                            reply=ROUTE,
                            round=action.round,
                            base=action.base,
                            tokens=action.tokens,
                            q=q,
                        )
                    )
                case edge.SendForward():
                    self.up(
                        Forward(
                            session="s",
                            epoch=1,
                            reply=ROUTE,
                            round=action.round,
                            base=action.base,
                            parent=action.parent,
                            accepted=action.accepted,
                            next_token=action.next_token,
                            tokens=action.tokens,
                            q=encode(action.rows, action.tokens),
                        )
                    )
                case edge.StartDraft():
                    self.later(self.draft_ms, lambda action=action: self.on_edge(self.drafted(action)))
                case edge.SetTimer():
                    timed = edge.TimerFired(action.timer)
                    at = self.now_ms + action.delay_ms
                    heapq.heappush(
                        self.queue, (at, next(self.order), lambda timed=timed: self.on_edge(timed))
                    )
                case edge.Finish():
                    self.finished = True
                case edge.Fail():
                    raise AssertionError(action)

    def up(self, message: Prompt | Block | Forward) -> None:
        self.later(0.6, lambda: self.on_verifier(verifier.Received(message)), "up")

    def drafted(self, asked: edge.StartDraft) -> edge.Drafted:
        path = (*self.edge.committed[: asked.base], *asked.assumed)
        threshold = RULE.first if asked.threshold is None else asked.threshold
        tokens: list[int] = []
        rows, thresholds, places = [], [], []
        for _ in range(asked.length):
            context = (*path, *tokens)
            drawn = draft_token(
                table(DRAFT, context),
                Row(self.rules, context),
                None,
                lambda found, threshold=threshold: RULE.keep(found, threshold),
            )
            tokens.append(drawn.token)
            rows.append(drawn.row)
            threshold = RULE.after(threshold, drawn.dropped)
            thresholds.append(threshold)
            places.append(tuple((token, 0.3) for token in range(V)))
        sure = tuple(row.probability(token) for token, row in zip(tokens, rows, strict=True))
        return edge.Drafted(asked.lane, tuple(tokens), sure, tuple(places), tuple(rows), tuple(thresholds))

    # --- the verifier ---

    def on_verifier(self, event: verifier.VerifierEvent) -> None:
        for action in self.verifier.handle(event, self.now_ms):
            match action:
                case verifier.Claim():
                    claimed = verifier.Claimed(1, (), "g", policy=Policy.LATENCY)
                    self.later(0.1, lambda claimed=claimed: self.on_verifier(claimed))
                case verifier.OpenEngine():
                    self.passed(())
                case verifier.Verify():
                    self.kinds["trimmed" if action.rows and len(action.rows) < 2 else "verified"] += 1
                    self.passed(action.tokens, action)
                case verifier.Commit():
                    committed = verifier.Committed(action.base + len(action.tokens))
                    self.later(0.3, lambda committed=committed: self.on_verifier(committed))
                case verifier.Publish():
                    way = "" if isinstance(action.message, Hint) else "down"
                    self.later(0.6, lambda action=action: self.on_edge(edge.arrived(action.message)), way)
                case verifier.SetTimer():
                    timed = verifier.TimerFired(action.timer)
                    self.later(action.delay_ms, lambda timed=timed: self.on_verifier(timed))

    def passed(self, block: Tokens, asked: verifier.Verify | None = None) -> None:
        """A pass of the engine: hints on the way, the answer at its end."""
        drawn_from = self.told(asked.rows) if asked is not None else ()
        texts = [(*self.said, *block[:length]) for length in range(len(block) + 1)]
        rows = [Row(self.rules, text) for text in texts]
        accepted, next_token = judge(lambda row: table(TARGET, texts[row]), rows, block, drawn_from)
        tokens = (*block[:accepted], next_token)[: LENGTH - len(self.said)]
        if asked is not None and asked.round != verifier.NO_ROUND:
            foreseen = (
                Outcome(accepted=accepted, next_token=next_token, confidence=0.6),
                Outcome(accepted=0, next_token=(next_token + 1) % V, confidence=0.3),
            )
            seen = verifier.ExitSeen(asked.base, 3, foreseen, 0.5)
            self.later(1.5, lambda: self.on_verifier(seen))
        reason = FinishReason.LENGTH if len(self.said) + len(tokens) == LENGTH else None
        self.said += tokens
        self.later(4.0, lambda: self.on_verifier(verifier.EngineAnswered(tokens, reason)))


def table(logits: Logits, text: Tokens) -> Logits:
    """The logits after a text: they depend on its last token."""
    return logits[text[-1] if text else V]


def deviation(said: Counter[Tokens]) -> float:
    """The probability of answers as unlike the target's as these (chi-squared, rare ones together)."""
    p = np.exp(TARGET.astype(float))
    p /= p.sum(axis=1, keepdims=True)
    total = sum(said.values())
    cells: dict[Tokens | None, list[float]] = {}
    for answer in itertools.product(range(V), repeat=LENGTH):
        due = total * math.prod(p[before, token] for before, token in itertools.pairwise((V, *answer)))
        cell = cells.setdefault(answer if due >= 10 else None, [0.0, 0.0])
        cell[0] += said[answer]
        cell[1] += due
    statistic = sum((seen - due) ** 2 / due for seen, due in cells.values())
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def played(count: int, **options: Any) -> tuple[Counter[Tokens], Counter[str]]:
    said: Counter[Tokens] = Counter()
    kinds: Counter[str] = Counter()
    for number in range(count):
        play = Play(number, **options)
        said[play.run()] += 1
        kinds += play.kinds
    return said, kinds


@pytest.mark.timeout(300)
def test_answers_are_distributed_as_the_targets_whatever_the_speculation_does() -> None:
    said, kinds = played(SESSIONS)
    assert min(kinds[kind] for kind in ("SendForward", "SendBlock", "trimmed", "DropDraft")) > SESSIONS / 40
    assert deviation(said) > 0.001


@pytest.mark.timeout(300)
def test_rows_that_are_not_what_was_drawn_from_are_found() -> None:
    def level(rows: tuple[SparseRow, ...]) -> tuple[SparseRow, ...]:
        return tuple(SparseRow(row.tokens, (1,) * len(row.tokens)) for row in rows)

    said, _ = played(SESSIONS // 2, told=level)
    assert deviation(said) < 1e-6
