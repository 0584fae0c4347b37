"""The gateway's metrics: what clients see (first token, gaps) and what speculation does (rounds, lanes, leads)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from shared.speculation.edge import EdgeStatistics
from shared.telemetry import LATENCY_BUCKETS_S

ANSWER_BUCKETS_S: Final = (*LATENCY_BUCKETS_S, 16.384, 32.768, 65.536)

GENERATIONS = Counter(
    "outrider_gateway_generations", "Generations ended, by how: a finish reason or an error code.", ["end"]
)
STREAMS = Gauge("outrider_gateway_streams", "Generations in flight.")
TOKENS = Counter("outrider_gateway_tokens", "Committed tokens delivered, by who wrote them.", ["source"])
ROUNDS = Counter("outrider_gateway_rounds", "Blocks sent, re-sent ones once.")
RESENT = Counter("outrider_gateway_rounds_resent", "Times that an unanswered round was sent again.")
DRAFTED = Counter("outrider_gateway_drafted_tokens", "Draft tokens sent in blocks.")
ACCEPTED = Counter("outrider_gateway_accepted_tokens", "Draft tokens that verdicts accepted.")
HINTS = Counter("outrider_gateway_hints", "Hints that came before the verdict of their round.")
HINTED_ROUNDS = Counter("outrider_gateway_hinted_rounds", "Rounds with at least one hint before the verdict.")
LANES = Counter("outrider_gateway_lanes", "Rounds by how the lanes fared: hit, late or miss.", ["fate"])
EXIT_LEAD = Histogram(
    "outrider_gateway_exit_lead_seconds",
    "How long a hint came before its verdict, by exit layer.",
    ["layer"],
    buckets=LATENCY_BUCKETS_S,
)
FIRST_TOKEN = Histogram(
    "outrider_gateway_first_token_seconds",
    "From the request to the first committed token.",
    buckets=ANSWER_BUCKETS_S,
)
INTER_TOKEN = Histogram(
    "outrider_gateway_inter_token_seconds",
    "Time between deliveries, over the tokens of the later one.",
    buckets=ANSWER_BUCKETS_S,
)


class Watch:
    """Turns the statistics of one generation into metrics, as they grow."""

    def __init__(self, statistics: EdgeStatistics) -> None:
        self._statistics = statistics
        self._counted = EdgeStatistics()
        self._leads: dict[int, int] = {}
        self._last_s = time.monotonic()
        self._first = True
        STREAMS.inc()

    def delivered(self, sources: Sequence[str]) -> None:
        """Tokens were delivered."""
        now_s = time.monotonic()
        gap_s, self._last_s = now_s - self._last_s, now_s
        if self._first:
            FIRST_TOKEN.observe(gap_s)
        else:
            INTER_TOKEN.observe(gap_s / len(sources))
        self._first = False
        for source in set(sources):
            TOKENS.labels(source).inc(sources.count(source))
        self.update()

    def update(self) -> None:
        """Count what is new in the statistics."""
        seen, counted = self._statistics, self._counted
        ROUNDS.inc(seen.rounds - counted.rounds)
        RESENT.inc(seen.resent - counted.resent)
        DRAFTED.inc(seen.drafted - counted.drafted)
        ACCEPTED.inc(seen.accepted - counted.accepted)
        HINTS.inc(seen.hints - counted.hints)
        HINTED_ROUNDS.inc(seen.hinted_rounds - counted.hinted_rounds)
        LANES.labels("hit").inc(seen.hits - counted.hits)
        LANES.labels("late").inc(seen.late - counted.late)
        LANES.labels("miss").inc(seen.misses - counted.misses)
        for layer, leads in seen.exit_lead_ms.items():
            known = self._leads.get(layer, 0)
            for lead_ms in leads[known:]:
                EXIT_LEAD.labels(str(layer)).observe(lead_ms / 1000)
            self._leads[layer] = len(leads)
        self._counted = EdgeStatistics(
            rounds=seen.rounds,
            resent=seen.resent,
            drafted=seen.drafted,
            accepted=seen.accepted,
            hints=seen.hints,
            hinted_rounds=seen.hinted_rounds,
            hits=seen.hits,
            late=seen.late,
            misses=seen.misses,
        )

    def end(self, how: str) -> None:
        """The generation has ended."""
        self.update()
        GENERATIONS.labels(how).inc()
        STREAMS.dec()
