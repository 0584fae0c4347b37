"""From recorded rounds to ranked outcomes with calibrated confidences, and how good they are.

With a_n the probability that the draft's token at place n is accepted and p_n the distribution over tokens there,

    P(accepted = n, next = t) = Π_{i<n} a_i · (1 − a_n) · p_n(t) / (1 − p_n(d_n))      for t ≠ d_n, n < K
    P(accepted = K, next = t) = Π_{i<K} a_i · p_K(t)

which sums to one. An exit's a_n comes from its judge, the edge's from the draft's confidence; both through a line on the
logit fitted on rounds over the target's own text. What an outcome then promises is put right by a second such line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

KEPT: Final = 16
HINTED: Final = 8
BEST: Final = (1, 2, 4, 8)
FLOOR: Final = 1e-4


@dataclass(frozen=True, slots=True)
class Line:
    """`slope · x + offset` on logits."""

    slope: float = 1.0
    offset: float = 0.0

    def __call__(self, logits: Tensor) -> Tensor:
        return self.slope * logits + self.offset


@dataclass(frozen=True, slots=True)
class Calibration:
    """How one exit's (or the edge's) raw figures become probabilities.

    `accept` turns the judge's logit into that of acceptance, `outcome` the logit of an outcome's probability into that
    of its being the verdict, `mix` is the weight of the exit's log-probabilities beside the edge's.
    """

    accept: Line = Line()
    outcome: Line = Line()
    mix: float = 0.6

    def as_json(self) -> dict[str, object]:
        """As plain values, for a file's header."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Calibration:
        """The reverse of `as_json`."""
        return cls(Line(**fields["accept"]), Line(**fields["outcome"]), float(fields["mix"]))


@dataclass(frozen=True, slots=True)
class Ranking:
    """Ranked outcomes of rounds `[rounds, KEPT]`: accepted length, next token, probability."""

    accepted: Tensor
    tokens: Tensor
    probability: Tensor

    def key(self) -> Tensor:
        """One number an outcome."""
        return self.accepted * (1 << 20) + self.tokens


def logit(probability: Tensor) -> Tensor:
    """log(p / (1 − p)), kept finite."""
    clamped = probability.clamp(1e-6, 1 - 1e-6)
    return clamped.log() - (-clamped).log1p()


def rank(accept: Tensor, drafts: Tensor, drafted: Tensor, tokens: Tensor, scores: Tensor) -> Ranking:
    """Outcomes of rounds, best first.

    `accept` `[rounds, K]` are logits of acceptance, `drafts` the block, `drafted` the log-probability of its tokens,
    `tokens` and `scores` `[rounds, K + 1, width]` the likeliest tokens at each place and their log-probabilities.
    """
    rounds = len(drafts)
    held = F.logsigmoid(accept).cumsum(dim=1)
    before = torch.cat((torch.zeros(rounds, 1), held), dim=1)
    stop = torch.cat((F.logsigmoid(-accept), torch.zeros(rounds, 1)), dim=1)
    rest = torch.log(-torch.expm1(drafted.float().clamp(max=-1e-4)))
    rest = torch.cat((rest, torch.zeros(rounds, 1)), dim=1)
    total = (before + stop - rest)[:, :, None] + scores.float()
    own = torch.cat((drafts, torch.full((rounds, 1), -1)), dim=1)[:, :, None]
    total = total.masked_fill(tokens == own, -torch.inf)
    best, place = total.flatten(1).topk(KEPT, dim=1)
    return Ranking(place // tokens.shape[2], tokens.flatten(1).gather(1, place), best.exp().clamp(max=1.0))


def edge_accept(record: Mapping[str, Tensor]) -> Tensor:
    """The edge's raw logits of acceptance: the draft's confidence."""
    return logit(record["edge_scores"][:, :-1, 0].float().exp())


def edge_ranking(record: Mapping[str, Tensor], calibration: Calibration) -> Ranking:
    """What the edge itself thinks when it sends a block."""
    return rank(
        calibration.accept(edge_accept(record)),
        record["drafts"].long(),
        record["edge_scores"][:, :-1, 0].float(),
        record["edge_tokens"].long(),
        record["edge_scores"].float(),
    )


def exit_ranking(record: Mapping[str, Tensor], layer: int, calibration: Calibration) -> Ranking:
    """What the exit after `layer` thinks."""
    return rank(
        calibration.accept(record[f"{layer}.judged"].float()),
        record["drafts"].long(),
        record[f"{layer}.drafted"].float(),
        record[f"{layer}.tokens"].long(),
        record[f"{layer}.scores"].float(),
    )


def mixed(hint: Ranking, edge: Ranking, weight: float) -> Ranking:
    """The edge's ranking after a hint of `HINTED` outcomes: a weighted mean of log-probabilities.

    An outcome that one side doesn't name gets `FLOOR` there.
    """
    keys = torch.cat((hint.key()[:, :HINTED], edge.key()), dim=1)
    probability = torch.cat((hint.probability[:, :HINTED], edge.probability), dim=1)
    same = keys[:, :, None] == keys[:, None, :]
    from_hint = torch.arange(keys.shape[1]) < HINTED

    def side(mask: Tensor) -> Tensor:
        return (same * torch.where(mask, probability, 0.0)[:, None, :]).amax(dim=2).clamp(min=FLOOR).log()

    combined = weight * side(from_hint) + (1 - weight) * side(~from_hint)
    repeated = (same & from_hint[None, None, :]).any(dim=2) & ~from_hint
    combined = combined.masked_fill(repeated, -torch.inf)
    place = combined.topk(KEPT, dim=1).indices
    chosen = keys.gather(1, place)
    share = combined.softmax(dim=1).gather(1, place)
    return Ranking(chosen >> 20, chosen & ((1 << 20) - 1), share)


def right(ranking: Ranking, record: Mapping[str, Tensor]) -> Tensor:
    """Which outcome is the verdict `[rounds, KEPT]`."""
    verdict = record["accepted"].long() * (1 << 20) + record["next"].long()
    return ranking.key() == verdict[:, None]


def in_best(ranking: Ranking, record: Mapping[str, Tensor]) -> dict[str, float]:
    """How often the verdict is among the best 1, 2, 4 and 8 outcomes."""
    hit = right(ranking, record)
    return {str(count): hit[:, :count].any(dim=1).float().mean().item() for count in BEST}


def length_right(ranking: Ranking, record: Mapping[str, Tensor]) -> float:
    """How often the likeliest outcome has the right accepted length."""
    return (ranking.accepted[:, 0] == record["accepted"].long()).float().mean().item()


def promised(ranking: Ranking, calibration: Calibration) -> Tensor:
    """The calibrated confidence of each outcome."""
    return torch.sigmoid(calibration.outcome(logit(ranking.probability)))


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Expected calibration error: |confidence − accuracy| over equally filled bins, weighted by their sizes."""
    order = confidence.flatten().argsort()
    pairs = torch.stack((confidence.flatten()[order].double(), correct.flatten()[order].double()))
    gaps = [abs(float(part[0].mean() - part[1].mean())) * part.shape[1] for part in pairs.chunk(bins, dim=1)]
    return sum(gaps) / pairs.shape[1]


def coverage(confidence: Tensor, correct: Tensor, thresholds: Sequence[float]) -> dict[str, dict[str, float]]:
    """Of the first outcomes: the share at or above each threshold, and how many of those are right."""
    found = {}
    for threshold in thresholds:
        sure = confidence[:, 0] >= threshold
        agreement = correct[sure, 0].float().mean().item() if bool(sure.any()) else 0.0
        found[str(threshold)] = {"coverage": sure.float().mean().item(), "agreement": agreement}
    return found


def fit_line(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Line:
    """The line that minimises cross-entropy (Platt scaling), by Newton's method."""
    parameters = torch.tensor([1.0, 0.0], dtype=torch.float64)
    inputs = torch.stack((logits.double(), torch.ones(len(logits), dtype=torch.float64)), dim=1)
    weight = torch.ones(len(logits), dtype=torch.float64) if weights is None else weights.double()
    for _ in range(30):
        probability = torch.sigmoid(inputs @ parameters)
        gradient = inputs.T @ (weight * (probability - labels.double()))
        curvature = (inputs * (weight * probability * (1 - probability))[:, None]).T @ inputs
        step = torch.linalg.solve(curvature + 1e-6 * torch.eye(2, dtype=torch.float64), gradient)
        parameters = parameters - step.clamp(-2.0, 2.0)
    return Line(*parameters.tolist())


def _judged_places(record: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Which places of the blocks the target judged, and whether it accepted."""
    accepted = record["accepted"].long()[:, None]
    place = torch.arange(record["drafts"].shape[1])
    return place <= accepted, place < accepted


def fit(record: Mapping[str, Tensor], layer: int | None, edge: Calibration | None = None) -> Calibration:
    """The calibration of one exit, or, without `layer`, of the edge, on recorded rounds."""
    judged, accepted = _judged_places(record)
    raw = edge_accept(record) if layer is None else record[f"{layer}.judged"].float()
    accept = fit_line(raw[judged], accepted[judged])
    partial = Calibration(accept=accept)
    ranking = edge_ranking(record, partial) if layer is None else exit_ranking(record, layer, partial)
    hit = right(ranking, record)
    outcome = fit_line(logit(ranking.probability[:, :HINTED]).flatten(), hit[:, :HINTED].flatten())
    if layer is None or edge is None:
        return Calibration(accept, outcome)
    guesses = edge_ranking(record, edge)

    def hits(weight: float) -> float:
        return sum(in_best(mixed(ranking, guesses, weight), record).values())

    return Calibration(accept, outcome, max((step / 20 for step in range(21)), key=hits))
