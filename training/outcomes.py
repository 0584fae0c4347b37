"""From recorded rounds to ranked outcomes with calibrated confidences, and how good they are.

The ranking is `shared.speculation.outcomes`, the very functions that the verifier and the edge call; here they are run
over rounds that `simulate` has recorded, counted, and fitted: two lines that put right what a judge (or the draft's own
confidence) and an outcome's probability promise, and the weights with which the edge mixes a hint with its own guess.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from services.draft_gateway.drafting.network import CHOICES
from shared.speculation.outcomes import (
    UNNAMED,
    Calibration,
    Line,
    Mixture,
    Ranked,
    calibrated,
    guess_outcomes,
    mix,
    rank_outcomes,
)

KEPT: Final = 16
"""Outcomes that the edge keeps of its own guess."""
HINTED: Final = 8
"""Outcomes that a hint names."""
BEST: Final = (1, 2, 4, 8)

Record = Mapping[str, Tensor]
Rankings = list[list[Ranked]]


def edge_rankings(record: Record, calibration: Calibration) -> Rankings:
    """What the edge itself thinks when it sends each block."""
    probabilities = record["edge_scores"][:, :, :CHOICES].float().exp().tolist()
    named = record["edge_tokens"][:, :, :CHOICES].tolist()
    found = []
    for drafts, tokens, shares in zip(record["drafts"].tolist(), named, probabilities, strict=True):
        confidences = [place[0] for place in shares[:-1]]
        alternatives = [list(zip(*place, strict=True)) for place in zip(tokens, shares, strict=True)]
        found.append(guess_outcomes(drafts, confidences, alternatives, KEPT, calibration))
    return found


def exit_rankings(record: Record, layer: int, calibration: Calibration) -> Rankings:
    """What the exit after `layer` hints at in each round."""
    line = calibration.accept
    accepted = F.logsigmoid(record[f"{layer}.judged"].float() * line.slope + line.offset).tolist()
    drafted = record[f"{layer}.drafted"].float().tolist()
    tokens = record[f"{layer}.tokens"][:, :, : HINTED + 1].tolist()
    scores = record[f"{layer}.scores"][:, :, : HINTED + 1].float().tolist()
    found = []
    for row, drafts in enumerate(record["drafts"].tolist()):
        candidates = [list(zip(*place, strict=True)) for place in zip(tokens[row], scores[row], strict=True)]
        ranked = rank_outcomes(drafted[row], accepted[row], drafts, candidates, HINTED)
        found.append(calibrated(ranked, calibration))
    return found


def mixed_rankings(own: Rankings, hints: Rankings, mixture: Mixture) -> Rankings:
    """What the edge thinks after each hint."""
    return [mix(guess, hint, mixture, KEPT) for guess, hint in zip(own, hints, strict=True)]


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
    """The line that minimises cross-entropy (Platt scaling), by Newton's method."""
    parameters = torch.tensor([1.0, 0.0], dtype=torch.float64)
    inputs = torch.stack((logits.double(), torch.ones(len(logits), dtype=torch.float64)), dim=1)
    for _ in range(30):
        probability = torch.sigmoid(inputs @ parameters)
        gradient = inputs.T @ (probability - labels.double())
        curvature = (inputs * (probability * (1 - probability))[:, None]).T @ inputs
        step = torch.linalg.solve(curvature + 1e-6 * torch.eye(2, dtype=torch.float64), gradient)
        parameters = parameters - step.clamp(-2.0, 2.0)
    return Line(*parameters.tolist())


def fit(record: Record, layer: int | None = None) -> Calibration:
    """The calibration of one exit, or, without `layer`, of the edge's own guess, on recorded rounds."""
    place = torch.arange(record["drafts"].shape[1])
    accepted = record["accepted"].long()[:, None]
    judged = place <= accepted  # the target judged the drafts up to the first that it refused
    raw = edge_odds(record) if layer is None else record[f"{layer}.judged"].float()
    accept = fit_line(raw[judged], (place < accepted)[judged])
    partial = Calibration(accept=accept)
    rankings = edge_rankings(record, partial) if layer is None else exit_rankings(record, layer, partial)
    named = promised(rankings, HINTED)
    hit = right(rankings, record, HINTED)[named > 0]
    return Calibration(accept, fit_line(log_odds(named[named > 0]), hit))


def edge_odds(record: Record) -> Tensor:
    """The draft's own log-odds of each of its tokens `[rounds, K]`."""
    return log_odds(record["edge_scores"][:, :-1, 0].float().exp())


def log_odds(probability: Tensor) -> Tensor:
    """log(p / (1 − p)), kept finite."""
    clamped = probability.clamp(1e-6, 1 - 1e-6)
    return clamped.log() - (-clamped).log1p()


def fit_mixture(own: Rankings, hints: Rankings, record: Record) -> Mixture:
    """The mixture under which the verdicts are likeliest: a conditional logit over what either side names, and the rest.

    Convex in the two exponents and the logarithm of `other`; L-BFGS from the plain mixture.
    """
    choices = [_choices(guess, hint) for guess, hint in zip(own, hints, strict=True)]
    width = max(map(len, choices))
    features = torch.zeros(len(choices), width, 2, dtype=torch.float64)
    absent = torch.ones(len(choices), width, dtype=torch.bool)
    chosen = torch.full((len(choices),), width)  # the column of `other`
    for row, (outcomes, verdict) in enumerate(zip(choices, verdicts(record), strict=True)):
        features[row, : len(outcomes)] = torch.tensor(list(outcomes.values()), dtype=torch.float64)
        absent[row, : len(outcomes)] = False
        if verdict in outcomes:
            chosen[row] = list(outcomes).index(verdict)
    start = Mixture()
    parameters = torch.tensor([start.own, start.hint, math.log(start.other)]).double()
    parameters.requires_grad_()
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = (features @ parameters[:2]).masked_fill(absent, -torch.inf)
        scores = torch.cat((scores, parameters[2].expand(len(scores), 1)), dim=1)
        found = F.cross_entropy(scores, chosen)
        torch.autograd.backward(found)
        return found

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    weights = parameters.detach()
    return Mixture(float(weights[0]), float(weights[1]), float(weights[2].exp()))


def _choices(own: list[Ranked], hint: list[Ranked]) -> dict[tuple[int, int], tuple[float, float]]:
    """What either side names, with the logarithms of what both say of it, as `mix` takes them."""
    sides = [
        {(accepted, token): max(share, UNNAMED) for accepted, token, share in side} for side in (own, hint)
    ]
    named = {**sides[1], **sides[0]}
    return {
        outcome: (math.log(sides[0].get(outcome, UNNAMED)), math.log(sides[1].get(outcome, UNNAMED)))
        for outcome in named
    }
