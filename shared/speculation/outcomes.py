"""Outcomes of a verification, ranked: what an exit foresees, what the edge guesses by itself, and both together.

An outcome is (accepted length, next token). With drafts d_0 … d_{K-1}, a distribution p_n over what stands at place n if
the drafts before it hold, and a_n the probability that draft n is accepted,

    P(accepted = n, next = t) = Π_{i<n} a_i · (1 - a_n) · p_n(t) / (1 - p_n(d_n))      for n < K, t ≠ d_n
    P(accepted = K, next = t) = Π_{i<K} a_i · p_K(t)

which sums to one over all outcomes. An exit takes p from its own scores and a from its judge, the edge takes both from
the draft model. How far either can be trusted is measured once and kept with the weights (`Calibration`, `Mixture`).

The edge pools its own guess and all hints of a round log-linearly: with what each says of an outcome as x_i,

    P(outcome) = exp(Σ w_i · x_i) / (other + Σ over all outcomes that any side names)

What a side says of the accepted length and what it says of the token weigh differently: the draft knows little of which
of its tokens will be refused, and much of what may stand in their place (`evidence`).

Arithmetic only: no I/O, no torch. `training` measures with these same functions.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

LogProb = float
Candidate = tuple[int, float]
"""A token and its log-probability."""
Outcome = tuple[int, int]
"""Accepted length and next token."""
Hinted = Sequence[tuple[int, int, float]]
"""What a hint names: accepted length, next token, probability."""

LEAST: Final = 1e-12
FLOOR: Final = math.log(1e-4)
"""The least that a side's word counts for, as a logarithm."""
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
    """How raw figures become probabilities: that a draft is accepted, and that an outcome is the verdict.

    `judgement`, where there is one, takes the place of `accept` for a draft whose confidence is known: weights of what
    a judge's word leaves unsaid (`exit_modules.judgement_inputs`).
    """

    accept: Line = Line()
    outcome: Line = Line()
    judgement: tuple[float, ...] = ()

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Calibration:
        """From what `dataclasses.asdict` made of one; KeyError, TypeError or ValueError when it is none."""
        judgement = tuple(float(weight) for weight in fields.get("judgement", ()))
        return cls(_line(fields["accept"]), _line(fields["outcome"]), judgement)


@dataclass(frozen=True, slots=True)
class Weights:
    """What one side is worth in the pool: exponents on the probability of what it names (of a token after a length, where
    it is the edge itself; of the whole outcome, where it is a hint) and on that of the accepted length; `unnamed` is
    the logarithm of what it gives to what it doesn't name."""

    named: float
    length: float
    unnamed: float

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Weights:
        """From what `dataclasses.asdict` made of one; KeyError, TypeError or ValueError when it is none."""
        return cls(float(fields["named"]), float(fields["length"]), float(fields["unnamed"]))


@dataclass(frozen=True, slots=True)
class Mixture:
    """What the edge's own guess and the hints of a round, by layer, are worth beside each other.

    `other` is the weight of all outcomes that nobody names, on the scale of the product (a conditional logit).
    """

    own: Weights = Weights(0.4, 0.4, 0.4 * FLOOR)
    hints: Mapping[int, Weights] = field(default_factory=dict)
    other: float = 0.05

    @classmethod
    def plain(cls, layer: int, own: float = 0.4, hint: float = 0.6, other: float = 0.05) -> Mixture:
        """One exponent a side."""
        return cls(Weights(own, own, own * FLOOR), {layer: Weights(hint, 0.0, hint * FLOOR)}, other)

    @classmethod
    def from_json(cls, layer: int, fields: Mapping[str, Any]) -> Mixture:
        """From what `dataclasses.asdict` made of one, or from the exponents `own`, `hint` and `other` of older files;
        KeyError, TypeError or ValueError when it is neither."""
        if "hint" in fields:
            return cls.plain(layer, float(fields["own"]), float(fields["hint"]), float(fields["other"]))
        hints = {int(number): Weights.from_json(weights) for number, weights in fields["hints"].items()}
        return cls(Weights.from_json(fields["own"]), hints, float(fields["other"]))


@dataclass(frozen=True, slots=True)
class Foresight:
    """What is known of a draft and the exits beside it: how sure to be of own guesses, and how to weigh hints."""

    own: Calibration = Calibration()
    mixtures: Mapping[int, Mixture] = field(default_factory=dict)

    def mixture(self, layer: int) -> Mixture:
        """How to weigh what is known once the exit after `layer` has spoken."""
        return self.mixtures.get(layer) or Mixture.plain(layer)


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
    outcomes = [
        (length, token, share + log_prob)
        for length, (share, names) in enumerate(_places(drafted, accepted, drafts, candidates))
        for token, log_prob in names
    ]
    return _best(outcomes, limit)


@dataclass(frozen=True, slots=True)
class Guess:
    """What the edge expects of a block by itself, by accepted length: how likely that is, and what may follow."""

    lengths: tuple[LogProb, ...]
    names: tuple[Mapping[int, LogProb], ...]
    """Log-probabilities of a few tokens after each length, given that length."""

    def ranking(self, limit: int, calibration: Calibration) -> list[Ranked]:
        """The likeliest outcomes, most likely first."""
        outcomes = (
            (length, token, share + log_prob)
            for length, (share, names) in enumerate(zip(self.lengths, self.names, strict=True))
            for token, log_prob in names.items()
        )
        return calibrated(_best(outcomes, limit), calibration)


def guess(
    tokens: Sequence[int],
    confidences: Sequence[float],
    alternatives: Sequence[Sequence[tuple[int, float]]],
    calibration: Calibration = Calibration(),
) -> Guess:
    """What the edge expects of a block by itself.

    `confidences[n]` is the draft's probability of `tokens[n]` given those before it, `alternatives[n]` are its likeliest
    tokens there with their probabilities (as `Draft` has them); one entry more says what may follow the block. Lengths
    without alternatives are left out.
    """
    held = [log_sigmoid(calibration.accept(logit(confidence))) for confidence in confidences]
    drafted = [_log(confidence) for confidence in confidences]
    candidates = [[(token, _log(share)) for token, share in place] for place in alternatives]
    places = list(_places(drafted, held, tokens, candidates))
    return Guess(tuple(share for share, _ in places), tuple(dict(names) for _, names in places))


def calibrated(ranking: Iterable[Ranked], calibration: Calibration) -> list[Ranked]:
    """The same outcomes in the same order, with the probability that measurement says they have."""
    line = calibration.outcome
    if line == Line():
        return list(ranking)
    return [
        Ranked(accepted, token, sigmoid(line.slope * logit(share) + line.offset))
        for accepted, token, share in ranking
    ]


# --- pooling ------------------------------------------------------------------------------------------------------


def evidence(own: Guess, hints: Mapping[int, Hinted], layers: Iterable[int]) -> dict[Outcome, list[float]]:
    """What each side says of every outcome that any of them names, in the order of `Mixture`'s weights: three figures of
    the edge itself, three of each of `layers`. A hint that has not come says the same of all: nothing."""
    foreseen = {layer: _Foreseen.of(hints[layer]) for layer in layers if layer in hints}
    outcomes = {outcome: None for hint in foreseen.values() for outcome in hint.shares}
    outcomes |= {(length, token): None for length, names in enumerate(own.names) for token in names}
    found = {}
    for length, token in outcomes:
        known = length < len(own.lengths)
        figures = _figures(
            own.names[length].get(token) if known else None, own.lengths[length] if known else FLOOR
        )
        for layer in layers:
            hint = foreseen.get(layer)
            if hint is None:
                figures += [0.0, 0.0, 0.0]
            else:
                figures += _figures(hint.shares.get((length, token)), hint.lengths.get(length, FLOOR))
        found[length, token] = figures
    return found


def mix(own: Guess, hints: Mapping[int, Hinted], mixture: Mixture, limit: int | None = None) -> list[Ranked]:
    """One ranking of what the edge guesses and what exits foresee (`hints`, by layer), most likely first."""
    layers = tuple(mixture.hints)
    worth = [
        weight
        for side in (mixture.own, *mixture.hints.values())
        for weight in (side.named, side.length, side.unnamed)
    ]
    weights = {
        outcome: math.exp(sum(weight * figure for weight, figure in zip(worth, figures, strict=True)))
        for outcome, figures in evidence(own, hints, layers).items()
    }
    total = sum(weights.values()) + mixture.other
    ranked = [Ranked(accepted, token, weight / total) for (accepted, token), weight in weights.items()]
    ranked.sort(key=lambda outcome: -outcome.probability)
    return ranked[:limit]


class _Foreseen(NamedTuple):
    """A hint's outcomes and the accepted lengths that they add up to, as log-probabilities."""

    shares: dict[Outcome, LogProb]
    lengths: dict[int, LogProb]

    @classmethod
    def of(cls, hint: Hinted) -> _Foreseen:
        lengths: dict[int, float] = {}
        for accepted, _, share in hint:
            lengths[accepted] = lengths.get(accepted, 0.0) + share
        return cls(
            {(accepted, token): _log(share) for accepted, token, share in hint},
            {accepted: _log(share) for accepted, share in lengths.items()},
        )


def _figures(named: LogProb | None, length: LogProb) -> list[float]:
    """What a side says of an outcome: log-probabilities of what it names, of the length, and whether it names nothing."""
    return [
        0.0 if named is None else max(FLOOR, named),
        max(FLOOR, min(0.0, length)),
        float(named is None),
    ]


# --- the formula --------------------------------------------------------------------------------------------------


def _best(outcomes: Iterable[tuple[int, int, LogProb]], limit: int) -> list[Ranked]:
    best = sorted(outcomes, key=operator.itemgetter(2), reverse=True)[:limit]
    return [Ranked(length, token, min(1.0, math.exp(log_prob))) for length, token, log_prob in best]


def _places(
    drafted: Sequence[LogProb],
    accepted: Sequence[LogProb],
    drafts: Sequence[int],
    candidates: Sequence[Sequence[Candidate]],
) -> Iterator[tuple[LogProb, list[Candidate]]]:
    """For each accepted length its log-probability, and those of tokens that may follow, given that length."""
    prefix = 0.0
    for length, row in enumerate(candidates):
        if length >= len(drafts):
            yield prefix, list(row)
            continue
        draft = drafts[length]
        others = [(token, log_prob) for token, log_prob in row if token != draft]
        named = sum(math.exp(log_prob) for _, log_prob in others)
        rest = math.log(max(-math.expm1(drafted[length]), named, LEAST))
        refused = prefix + _log_not(accepted[length])
        yield refused, [(token, log_prob - rest) for token, log_prob in others]
        prefix += accepted[length]


# --- probabilities ------------------------------------------------------------------------------------------------


def logit(probability: float) -> float:
    """log(p / (1 - p)), kept finite."""
    if not LEAST < probability < 1.0 - LEAST:
        return SUREST_LOGIT if probability > 0.5 else -SUREST_LOGIT
    return max(-SUREST_LOGIT, min(SUREST_LOGIT, math.log(probability / (1.0 - probability))))


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x)."""
    if x >= 0:
        return 1.0 / (1.0 + math.exp(-x))
    odds = math.exp(x)
    return odds / (1.0 + odds)


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
