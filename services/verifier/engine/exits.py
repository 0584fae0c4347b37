"""Early exits: small modules that foresee, after some of the layers, what the last one will say.

An exit module turns the residual stream after its layer into a guess of the residual stream after the last one; the
model's own final norm and LM head do the rest. Untrained, the guess is the stream itself. What the modules are is in
`exit_modules`, where trained ones come from in `exit_files`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from services.verifier.engine.channel import ExitMessage, Outlook
from services.verifier.engine.exit_files import ExitSet
from services.verifier.engine.exit_head import NamingHead
from services.verifier.engine.exit_modules import Judged
from shared.sampling.rules import Row
from shared.speculation.outcomes import calibrated, rank_outcomes


class VerifiedRows(NamedTuple):
    """A session's rows in a pass: `start` and its drafts' count + 1 of them; `base` output tokens stand before."""

    key: str
    base: int
    start: int
    drafts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pass:
    """What the exits look at in one pass: its rows (indices into the pass' tokens) and whose they are."""

    began: float
    """On the monotonic clock, seconds."""
    rows: Tensor
    sessions: tuple[VerifiedRows, ...]
    drafts: Tensor = field(repr=False)
    """[rows]: the draft token that each row judges; 0 where there is none (the last row of a session)."""
    sure: Tensor = field(repr=False)
    """[rows]: log-probability of that token in the draft model; NaN where it is not known."""
    draws: tuple[Row | None, ...] = field(repr=False, default=())
    """[rows]: how the row's token is drawn, None for greedy decoding; empty where no row's is drawn otherwise."""


class ExitReader:
    """Applies the exits to a pass' rows and says what they foresee."""

    def __init__(
        self, exits: ExitSet, norm: Callable[[Tensor], Tensor], head: NamingHead, outcomes: int
    ) -> None:
        """`norm` and `head` are the model's last ones; `outcomes` is how many a hint names at most."""
        self.exits = exits
        self.head = head
        self._norm = norm
        self._outcomes = outcomes

    @torch.inference_mode()
    def read(self, layer: int, hidden: Tensor, current: Pass, elapsed_ms: Callable[[], float]) -> ExitMessage:
        """The outlook of the exit after `layer` on every session of the pass; `hidden` is [rows, hidden size]."""
        module = self.exits.modules[layer]
        normed = self._norm(module(hidden))
        scores = self.head(normed, current.drafts, self._outcomes + 1, current.draws)
        judged = Judged(normed, scores.draft_rows, scores.drafted, current.sure, scores.log_probs[:, :2])
        accepted = module.acceptance(judged).tolist()
        drafted = scores.drafted.tolist()
        candidates = [
            list(zip(tokens, log_probs, strict=True))
            for tokens, log_probs in zip(scores.tokens.tolist(), scores.log_probs.tolist(), strict=True)
        ]
        outlooks = []
        for rows in current.sessions:
            own = slice(rows.start, rows.start + len(rows.drafts) + 1)
            ranked = rank_outcomes(drafted[own], accepted[own], rows.drafts, candidates[own], self._outcomes)
            outlooks.append(Outlook(rows.key, rows.base, list(calibrated(ranked, module.calibration))))
        return ExitMessage(layer, elapsed_ms(), outlooks)
