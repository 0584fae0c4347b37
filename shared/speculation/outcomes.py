"""Outcomes of a verification, ranked: what an exit foresees, what the edge guesses by itself, and both together.

An outcome is (accepted length, next token). With drafts d_0 … d_{K-1}, a distribution p_n over what stands at place n if
the drafts before it hold, and a_n the probability that draft n is accepted,

    P(accepted = n, next = t) = Π_{i<n} a_i · (1 - a_n) · p_n(t) / (1 - p_n(d_n))      for n < K, t ≠ d_n
    P(accepted = K, next = t) = Π_{i<K} a_i · p_K(t)

which sums to one over all outcomes. An exit takes p from its own scores and a from its judge, the edge takes both from
the draft model. How far either can be trusted is measured once and kept with the weights (`Calibration`, `Mixture`).

Arithmetic only: no I/O, no torch. `training` measures with these same functions.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

LogProb = float
Candidate = tuple[int, float]
"""A token and its log-probability."""

LEAST: Final = 1e-12
UNNAMED: Final = 1e-4
"""What a side gives an outcome that it does not name."""
SUREST_LOGIT: Final = 13.8
LEVELS: Final = 100
LOWEST_LEVEL: Final = -4.0
LEVEL_STEP: Final = 0.125


class Ranked(NamedTuple):
    """An outcome and the probability that it is the verdict."""

    accepted: int
    next_token: int
    probability: float


@dataclass(frozen=True, slots=True)
class Line:
    """`slope · x + offset` on a logit: what a measured probability says about the true one (Platt scaling)."""

    slope: float = 1.0
    offset: float = 0.0

    def __call__(self, x: float) -> float:
        """The corrected logit."""
        return self.slope * x + self.offset


@dataclass(frozen=True, slots=True)
class Calibration:
    """How raw figures become probabilities: that a draft is accepted, and that an outcome is the verdict."""

    accept: Line = Line()
    outcome: Line = Line()

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Calibration:
        """From what `dataclasses.asdict` made of one; KeyError, TypeError or ValueError when it is none."""
        return cls(_line(fields["accept"]), _line(fields["outcome"]))


@dataclass(frozen=True, slots=True)
class Mixture:
    """What two rankings are worth beside each other: exponents on their probabilities.

    `other` is the weight of all outcomes that neither names, on the scale of the product (a conditional logit).
    """

    own: float = 0.4
    hint: float = 0.6
    other: float = 0.05

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Mixture:
        """From what `dataclasses.asdict` made of one; KeyError, TypeError or ValueError when it is none."""
        return cls(float(fields["own"]), float(fields["hint"]), float(fields["other"]))


@dataclass(frozen=True, slots=True)
class Foresight:
    """What is known of a draft and the exits beside it: how sure to be of own guesses, and how to weigh hints."""

    own: Calibration = Calibration()
    mixtures: Mapping[int, Mixture] = field(default_factory=dict)

    def mixture(self, layer: int) -> Mixture:
        """How to weigh a hint of the exit after `layer`."""
        return self.mixtures.get(layer, Mixture())


# --- ranking ------------------------------------------------------------------------------------------------------


def rank_outcomes(
    drafted: Sequence[LogProb],
    accepted: Sequence[LogProb],
    drafts: Sequence[int],
    candidates: Sequence[Sequence[Candidate]],
    limit: int,
) -> list[Ranked]:
    """The `limit` most likely outcomes, most likely first, by the formula above.

    `drafted` are log p_n(d_n) and `accepted` log a_n, for n < K at least (without a judge they are the same).
    `candidates[n]` are the most likely tokens at place n: `limit + 1` of them, so that `limit` remain without d_n, in
    K + 1 rows; rows that are missing are outcomes that are not named. Ties go to the smaller accepted length.
    """
    outcomes = _outcomes(drafted, accepted, drafts, candidates)
    best = heapq.nlargest(limit, outcomes, key=lambda outcome: outcome[2])
    return [Ranked(length, token, min(1.0, math.exp(log_prob))) for length, token, log_prob in best]


def guess_outcomes(
    tokens: Sequence[int],
    confidences: Sequence[float],
    alternatives: Sequence[Sequence[tuple[int, float]]],
    limit: int,
    calibration: Calibration = Calibration(),
) -> list[Ranked]:
    """What the edge expects of a block by itself, most likely first.

    `confidences[n]` is the draft's probability of `tokens[n]` given those before it, `alternatives[n]` are its likeliest
    tokens there with their probabilities (as `Draft` has them); one entry more says what may follow the block. Places
    without alternatives yield no outcomes.
    """
    held = [log_sigmoid(calibration.accept(logit(confidence))) for confidence in confidences]
    drafted = [_log(confidence) for confidence in confidences]
    candidates = [[(token, _log(share)) for token, share in place] for place in alternatives]
    return calibrated(rank_outcomes(drafted, held, tokens, candidates, limit), calibration)


def calibrated(ranking: Iterable[Ranked], calibration: Calibration) -> list[Ranked]:
    """The same outcomes in the same order, with the probability that measurement says they have."""
    if calibration.outcome == Line():
        return list(ranking)
    return [
        Ranked(accepted, token, sigmoid(calibration.outcome(logit(share))))
        for accepted, token, share in ranking
    ]


def mix(
    own: Iterable[tuple[int, int, float]],
    hint: Iterable[tuple[int, int, float]],
    mixture: Mixture,
    limit: int | None = None,
) -> list[Ranked]:
    """One ranking of what the edge guesses (`own`) and what an exit foresees (`hint`), most likely first.

    An outcome's probability is own^w · hint^v over the sum of that for all that are named and `other`; a side that does
    not name an outcome gives it `UNNAMED`.
    """
    guessed = {(accepted, token): share for accepted, token, share in own}
    foreseen = {(accepted, token): share for accepted, token, share in hint}
    floor = math.log(UNNAMED)
    weights = {
        outcome: math.exp(
            mixture.own * max(floor, _log(guessed.get(outcome, 0.0)))
            + mixture.hint * max(floor, _log(foreseen.get(outcome, 0.0)))
        )
        for outcome in {**foreseen, **guessed}
    }
    total = sum(weights.values()) + mixture.other
    ranked = [Ranked(accepted, token, weight / total) for (accepted, token), weight in weights.items()]
    ranked.sort(key=lambda outcome: -outcome.probability)
    return ranked[:limit]


def _outcomes(
    drafted: Sequence[LogProb],
    accepted: Sequence[LogProb],
    drafts: Sequence[int],
    candidates: Sequence[Sequence[Candidate]],
) -> Iterator[tuple[int, int, LogProb]]:
    prefix = 0.0
    for length, row in enumerate(candidates):
        draft = drafts[length] if length < len(drafts) else None
        judged = 0.0
        if draft is not None:
            named = sum(math.exp(log_prob) for token, log_prob in row if token != draft)
            rest = max(-math.expm1(drafted[length]), named, LEAST)
            judged = _log_not(accepted[length]) - math.log(rest)
        for token, log_prob in row:
            if token != draft:
                yield length, token, prefix + judged + log_prob
        if draft is not None:
            prefix += accepted[length]


# --- probabilities ------------------------------------------------------------------------------------------------


def logit(probability: float) -> float:
    """log(p / (1 - p)), kept finite."""
    return max(-SUREST_LOGIT, min(SUREST_LOGIT, _log(probability) - _log(1.0 - probability)))


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def log_sigmoid(x: float) -> float:
    """log(1 / (1 + e^-x)), exact in both tails."""
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def level(confidence: float) -> int:
    """A confidence as a small number, 0 to `LEVELS` - 1, in even steps of its logit: how it travels."""
    return max(0, min(LEVELS - 1, round((logit(confidence) - LOWEST_LEVEL) / LEVEL_STEP)))


def confidence_at(level: int) -> float:
    """The confidence that a level stands for."""
    return sigmoid(LOWEST_LEVEL + level * LEVEL_STEP)


def _log(probability: float) -> LogProb:
    return math.log(max(probability, LEAST))


def _log_not(log_prob: LogProb) -> LogProb:
    """log(1 - p), finite also where rounding has made p one."""
    return math.log(max(-math.expm1(log_prob), LEAST))


def _line(fields: Mapping[str, Any]) -> Line:
    return Line(float(fields["slope"]), float(fields["offset"]))
