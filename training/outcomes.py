"""From recorded rounds to ranked outcomes with calibrated confidences, and how good they are.

The ranking is `shared.speculation.outcomes`, the very functions that the verifier and the edge call; here they are run
over rounds that `simulate` has recorded, counted, and fitted: what puts right what a judge (or the draft's own
confidence) and an outcome's probability promise, and the weights with which the edge pools its own guess and hints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from services.draft_gateway.drafting.network import CHOICES
from services.verifier.engine.exit_modules import calibrated_odds, judge_features, judgement_inputs
from shared.speculation.outcomes import (
    Calibration,
    Guess,
    Line,
    Mixture,
    Ranked,
    Weights,
    calibrated,
    evidence,
    guess,
    mix,
    rank_outcomes,
)

KEPT: Final = 16
"""Outcomes that the edge keeps of its own guess."""
HINTED: Final = 8
"""Outcomes that a hint names."""
BEST: Final = (1, 2, 4, 8)
RIDGE: Final = 3.0
"""How much the weights of a judgement, and of a pool, are held back, against as many rounds as there are."""

Record = Mapping[str, Tensor]
Rankings = list[list[Ranked]]


def edge_guesses(record: Record, calibration: Calibration) -> list[Guess]:
    """What the edge itself thinks when it sends each block."""
    probabilities = record["edge_scores"][:, :, :CHOICES].float().exp().tolist()
    named = record["edge_tokens"][:, :, :CHOICES].tolist()
    found = []
    for drafts, tokens, shares in zip(record["drafts"].tolist(), named, probabilities, strict=True):
        confidences = [place[0] for place in shares[:-1]]
        alternatives = [list(zip(*place, strict=True)) for place in zip(tokens, shares, strict=True)]
        found.append(guess(drafts, confidences, alternatives, calibration))
    return found


def edge_rankings(record: Record, calibration: Calibration) -> Rankings:
    """The outcomes that the edge itself makes likely when it sends each block."""
    return [own.ranking(KEPT, calibration) for own in edge_guesses(record, calibration)]


def exit_rankings(record: Record, layer: int, calibration: Calibration) -> Rankings:
    """What the exit after `layer` hints at in each round."""
    odds = calibrated_odds(record[f"{layer}.judged"].float(), judged_figures(record, layer), calibration)
    accepted = F.logsigmoid(odds).tolist()
    drafted = record[f"{layer}.drafted"].float().tolist()
    tokens = record[f"{layer}.tokens"][:, :, : HINTED + 1].tolist()
    scores = record[f"{layer}.scores"][:, :, : HINTED + 1].float().tolist()
    found = []
    for row, drafts in enumerate(record["drafts"].tolist()):
        candidates = [list(zip(*place, strict=True)) for place in zip(tokens[row], scores[row], strict=True)]
        ranked = rank_outcomes(drafted[row], accepted[row], drafts, candidates, HINTED)
        found.append(calibrated(ranked, calibration))
    return found


def judged_figures(record: Record, layer: int) -> Tensor:
    """The figures that the judge after `layer` saw of each draft `[rounds, K, FEATURES]`."""
    return judge_features(
        record[f"{layer}.drafted"], record["edge_scores"][:, :-1, 0], record[f"{layer}.scores"][:, :-1, :2]
    )


def mixed_rankings(own: Sequence[Guess], hints: Mapping[int, Rankings], mixture: Mixture) -> Rankings:
    """What the edge thinks of each round when the hints of some layers have come."""
    return [
        mix(guessed, {layer: rankings[at] for layer, rankings in hints.items()}, mixture, KEPT)
        for at, guessed in enumerate(own)
    ]


# --- figures ------------------------------------------------------------------------------------------------------


def verdicts(record: Record) -> list[tuple[int, int]]:
    """Accepted length and next token of each round."""
    return list(zip(record["accepted"].tolist(), record["next"].tolist(), strict=True))


def right(rankings: Rankings, record: Record, width: int) -> Tensor:
    """Which of each round's `width` best outcomes is the verdict `[rounds, width]`."""
    rows = [
        [outcome[:2] == verdict for outcome in ranking[:width]] + [False] * (width - len(ranking))
        for ranking, verdict in zip(rankings, verdicts(record), strict=True)
    ]
    return torch.tensor(rows)


def promised(rankings: Rankings, width: int) -> Tensor:
    """The confidence of each round's `width` best outcomes; 0 where there are fewer."""
    rows = [
        [outcome.probability for outcome in ranking[:width]] + [0.0] * (width - len(ranking))
        for ranking in rankings
    ]
    return torch.tensor(rows)


def in_best(rankings: Rankings, record: Record) -> dict[str, float]:
    """How often the verdict is among the best 1, 2, 4 and 8 outcomes."""
    hit = right(rankings, record, max(BEST))
    return {str(count): hit[:, :count].any(dim=1).float().mean().item() for count in BEST}


def length_right(rankings: Rankings, record: Record) -> float:
    """How often the likeliest outcome has the right accepted length."""
    pairs = zip(rankings, record["accepted"].tolist(), strict=True)
    hits: list[bool] = [bool(ranking) and ranking[0].accepted == length for ranking, length in pairs]
    return sum(hits) / len(hits)


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Expected calibration error: |confidence − accuracy| over equally filled bins, weighted by their sizes."""
    order = confidence.flatten().argsort()
    pairs = torch.stack((confidence.flatten()[order].double(), correct.flatten()[order].double()))
    gaps = [
        abs(float(part[0].mean() - part[1].mean())) * int(part.shape[1]) for part in pairs.chunk(bins, dim=1)
    ]
    return sum(gaps) / int(pairs.shape[1])


def coverage(confidence: Tensor, correct: Tensor, thresholds: Sequence[float]) -> dict[str, dict[str, float]]:
    """Of the first outcomes: the share at or above each threshold, and how many of those are right."""
    found = {}
    for threshold in thresholds:
        sure = confidence[:, 0] >= threshold
        agreement = correct[sure, 0].float().mean().item() if bool(sure.any()) else 0.0
        found[str(threshold)] = {"coverage": sure.float().mean().item(), "agreement": agreement}
    return found


# --- fits ---------------------------------------------------------------------------------------------------------


def fit_line(logits: Tensor, labels: Tensor) -> Line:
    """The line that minimises cross-entropy (Platt scaling)."""
    inputs = torch.stack((logits, torch.ones_like(logits)), dim=1)
    return Line(*logistic(inputs, labels, ridge=1e-6).tolist())


def logistic(inputs: Tensor, labels: Tensor, ridge: float) -> Tensor:
    """The weights of `inputs` `[n, m]` under which `labels` `[n]` are likeliest, less `ridge` / 2 times their squares."""
    inputs, labels = inputs.double(), labels.double()
    weights = torch.zeros(inputs.shape[1], dtype=torch.float64)
    weights.requires_grad_()

    def loss() -> Tensor:
        missed = F.binary_cross_entropy_with_logits(inputs @ weights, labels, reduction="sum")
        return missed + ridge / 2 * (weights * weights).sum()

    minimize(weights, loss)
    return weights.detach()


def minimize(parameters: Tensor, loss: Callable[[], Tensor]) -> None:
    """Moves `parameters` to where a convex loss is least (L-BFGS)."""
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=300, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        found = loss()
        torch.autograd.backward(found)
        return found

    optimizer.step(closure)  # type: ignore[no-untyped-call]


def fit(record: Record, layer: int | None = None) -> Calibration:
    """The calibration of one exit, or, without `layer`, of the edge's own guess, on recorded rounds."""
    place = torch.arange(record["drafts"].shape[1])
    accepted = record["accepted"].long()[:, None]
    judged = place <= accepted  # the target judged the drafts up to the first that it refused
    raw = edge_odds(record) if layer is None else record[f"{layer}.judged"].float()
    held = (place < accepted)[judged]
    accept = fit_line(raw[judged], held)
    judgement: tuple[float, ...] = ()
    if layer is not None:
        inputs = judgement_inputs(raw, judged_figures(record, layer))[judged]
        judgement = tuple(logistic(inputs, held, RIDGE).tolist())
    partial = Calibration(accept=accept, judgement=judgement)
    rankings = edge_rankings(record, partial) if layer is None else exit_rankings(record, layer, partial)
    named = promised(rankings, HINTED)
    hit = right(rankings, record, HINTED)[named > 0]
    return Calibration(accept, fit_line(log_odds(named[named > 0]), hit), judgement)


def edge_odds(record: Record) -> Tensor:
    """The draft's own log-odds of each of its tokens `[rounds, K]`."""
    return log_odds(record["edge_scores"][:, :-1, 0].float().exp())


def log_odds(probability: Tensor) -> Tensor:
    """log(p / (1 − p)), kept finite."""
    clamped = probability.clamp(1e-6, 1 - 1e-6)
    return clamped.log() - (-clamped).log1p()


def fit_mixture(own: Sequence[Guess], hints: Mapping[int, Rankings], record: Record) -> Mixture:
    """The mixture under which the verdicts are likeliest: a conditional logit over what any side names, and the rest.

    Convex in the weights and the logarithm of `other`. The mixture knows the layers of `hints`, in their order.
    """
    layers = tuple(hints)
    choices = [
        evidence(guessed, {layer: rankings[at] for layer, rankings in hints.items()}, layers)
        for at, guessed in enumerate(own)
    ]
    width = max(map(len, choices))
    features = torch.zeros(len(choices), width, 3 * (1 + len(layers)), dtype=torch.float64)
    absent = torch.ones(len(choices), width, dtype=torch.bool)
    chosen = torch.full((len(choices),), width)  # the column of `other`
    for row, (outcomes, verdict) in enumerate(zip(choices, verdicts(record), strict=True)):
        features[row, : len(outcomes)] = torch.tensor(list(outcomes.values()), dtype=torch.float64)
        absent[row, : len(outcomes)] = False
        if verdict in outcomes:
            chosen[row] = list(outcomes).index(verdict)
    weights = torch.zeros(features.shape[2] + 1, dtype=torch.float64)
    weights.requires_grad_()

    def loss() -> Tensor:
        scores = (features @ weights[:-1]).masked_fill(absent, -torch.inf)
        scores = torch.cat((scores, weights[-1].expand(len(scores), 1)), dim=1)
        missed = F.cross_entropy(scores, chosen, reduction="sum")
        return missed + RIDGE / 2 * (weights * weights).sum()

    minimize(weights, loss)
    *sides, other = weights.tolist()
    worth = [Weights(*sides[at : at + 3]) for at in range(0, len(sides), 3)]
    return Mixture(worth[0], dict(zip(layers, worth[1:], strict=True)), math.exp(other))
