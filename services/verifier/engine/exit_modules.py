"""The modules of early exits: an adapter that guesses the last residual stream, and a judge of the draft's tokens.

Naming the next token is hard after two thirds of the layers, saying whether the target will accept a given one is
easier: so the judge sees, beside the hidden state, the draft's token, what the exit itself thinks of it, and how sure the
draft was. `training` trains these same classes; what a file of them must say of itself is in `exits`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.verifier.engine.int8 import QuickMatrix, has_int8
from shared.speculation.outcomes import Calibration

FEATURES: Final = 8
"""Figures that a judge sees beside the two vectors."""
JUDGEMENT_INPUTS: Final = FEATURES + 1
"""One, the judge's word, and its figures but for the last."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What a judge is asked about, by rows: the guess `[rows, hidden]`, normed; the head's rows of the draft's tokens
    `[rows, hidden]`; log-probabilities of these in the exit, and in the draft (NaN where unknown) `[rows]`; those of the
    exit's two likeliest tokens `[rows, 2]`."""

    normed: Tensor
    token: Tensor
    drafted: Tensor
    sure: Tensor
    best: Tensor


class ExitModule(nn.Module):
    """An exit after one layer, untrained: the residual stream is its own guess, and the exit's own word is its judge."""

    calibration: Calibration = Calibration()

    def forward(self, hidden: Tensor) -> Tensor:
        """[rows, hidden size]: the residual stream after the layer → a guess of the one after the last layer."""
        return hidden

    def acceptance(self, judged: Judged) -> Tensor:
        """[rows]: log-probability that the draft token that a row judges is accepted."""
        return judged.drafted


class Judge(nn.Module):
    """Says whether the target will accept a draft token: a logit."""

    def __init__(self, hidden_size: int, rank: int, width: int) -> None:
        super().__init__()
        self.state = nn.Linear(hidden_size, rank, bias=False)
        self.token = nn.Linear(hidden_size, rank, bias=False)
        self.first = nn.Linear(3 * rank + FEATURES, width)
        self.last = nn.Linear(width, 1)

    def forward(self, judged: Judged, figures: Tensor | None = None) -> Tensor:
        """Logits `[rows]`; `figures` are those of `judge_features`, where they are known already."""
        state, drafted = self.state(judged.normed), self.token(judged.token)
        if figures is None:
            figures = judge_features(judged.drafted, judged.sure, judged.best)
        features = torch.cat((state, drafted, state * drafted, figures.to(state.dtype)), dim=-1)
        logit: Tensor = self.last(F.silu(self.first(features)))[:, 0]
        return logit.float()


class TrainedExit(ExitModule):
    """Adapter, h + down(silu(gate(n)) · up(n)) with n = norm(h), and judge."""

    def __init__(
        self, hidden_size: int, *, width: int, judge_rank: int, judge_width: int, eps: float
    ) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=eps)
        self.gate = nn.Linear(hidden_size, width, bias=False)
        self.up = nn.Linear(hidden_size, width, bias=False)
        self.down = nn.Linear(width, hidden_size, bias=False)
        self.judge = Judge(hidden_size, judge_rank, judge_width)
        nn.init.zeros_(self.down.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """See `ExitModule.forward`."""
        weight = self.norm.weight.to(hidden.dtype)
        normed = F.rms_norm(hidden, (hidden.shape[-1],), weight, self.norm.eps)
        guess: Tensor = hidden + self.down(F.silu(self.gate(normed)) * self.up(normed))
        return guess

    def acceptance(self, judged: Judged) -> Tensor:
        """See `ExitModule.acceptance`; calibrated."""
        return judged_acceptance(self.judge, judged, self.calibration)


class Int8Exit(ExitModule):
    """A trained exit whose adapter is kept in int8: what it costs on a CPU is reading its matrices."""

    def __init__(self, trained: TrainedExit) -> None:
        super().__init__()
        self._norm, self._eps = trained.norm.weight, trained.norm.eps
        self._gate_up = QuickMatrix(torch.cat((trained.gate.weight, trained.up.weight)), alone=True)
        self._down = QuickMatrix(trained.down.weight, alone=True)
        self.judge = trained.judge
        self.calibration = trained.calibration

    def forward(self, hidden: Tensor) -> Tensor:
        """See `ExitModule.forward`."""
        normed = F.rms_norm(hidden, (hidden.shape[-1],), self._norm, self._eps)
        gate, up = self._gate_up(normed).chunk(2, dim=-1)
        return hidden + self._down(F.silu(gate) * up)

    def acceptance(self, judged: Judged) -> Tensor:
        """See `ExitModule.acceptance`; calibrated."""
        return judged_acceptance(self.judge, judged, self.calibration)


def quickest(module: TrainedExit) -> TrainedExit | Int8Exit:
    """The module in the form that is quickest where its weights are."""
    return Int8Exit(module) if has_int8(module.down.weight) else module


def judged_acceptance(
    judge: Judge, judged: Judged, calibration: Calibration, weights: Tensor | None = None
) -> Tensor:
    """Log-probabilities `[rows]` that draft tokens are accepted: what a judge says, put right by measurement. `weights`
    are the calibration's `figure_weights`, where they are on the device already."""
    figures = judge_features(judged.drafted, judged.sure, judged.best)
    return F.logsigmoid(calibrated_odds(judge(judged, figures), figures, calibration, weights))


def figure_weights(calibration: Calibration, device: torch.device) -> Tensor:
    """What a calibration's judgement weighs the figures by `[FEATURES]`: what says that a confidence is known is one
    wherever this counts, and so takes the weight of the one."""
    one, _, *rest = calibration.judgement
    return torch.tensor((*rest, one), device=device)


def calibrated_odds(
    odds: Tensor, figures: Tensor, calibration: Calibration, weights: Tensor | None = None
) -> Tensor:
    """True log-odds `[…]` from a judge's log-odds `[…]` and the figures `[…, FEATURES]` that it saw."""
    line = odds * calibration.accept.slope + calibration.accept.offset
    if not calibration.judgement:
        return line
    if weights is None:
        weights = figure_weights(calibration, odds.device)
    # the products of `judgement_inputs`, without the inputs
    judged = (figures @ weights).add_(odds, alpha=calibration.judgement[1] / 5)
    return torch.where(figures[..., -1] > 0, judged, line)


def judgement_inputs(odds: Tensor, figures: Tensor) -> Tensor:
    """What `Calibration.judgement` weighs `[…, JUDGEMENT_INPUTS]`: one, the judge's log-odds, and the figures it saw but
    the last, which says whether the draft's confidence is known."""
    return torch.cat((torch.ones_like(odds)[..., None], odds[..., None] / 5, figures[..., :-1]), dim=-1)


def judge_features(drafted: Tensor, sure: Tensor, best: Tensor) -> Tensor:
    """`[…, FEATURES]`: log-odds and probabilities of the draft's token, here and in the draft, and of the best ones.

    `drafted` and `sure` `[…]`, `best` `[…, 2]` as in `Judged`. The last figure says whether `sure` is known.
    """
    best, drafted = best.float(), drafted.float().clamp(-25.0, 0.0)
    known = ~sure.isnan()
    sure = torch.where(known, sure, -1.0).float().clamp(-12.0, -1e-4)
    return torch.stack(
        (
            drafted / 5,
            drafted.exp(),
            (drafted - best[..., 0]).clamp(-20.0, 5.0) / 5,
            best[..., 0].exp(),
            (best[..., 0] - best[..., 1]).clamp(0.0, 20.0) / 5,
            sure.exp() * known,
            (sure - torch.log(-torch.expm1(sure))) / 5 * known,
            known.float(),
        ),
        dim=-1,
    )
