"""An exit in a dozen kernels instead of a hundred: what `graph_exits.GraphExits.outcomes` says, written in Triton.

Beside a target's large products an exit's small operations cost their number, not their work: each waits until a
multiprocessor is free. Products stay with the vendor's library, but for that with the rough head; between them stand

    gather  rows of the residual stream, their sum, the adapter's norm      gated   silu(gate) · up
    norm    the model's last one                                            rank    of a block: its likeliest outcomes
    score   of a row: the shortlist, exact logits, the judge
    rough_logits    the product with the rough head, and of each 64 columns the largest and their sum

All arithmetic between products is in float32; beside weights of 16 bits rough logits are kept in half precision. Tests hold
this against the same formulas in PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from services.verifier.engine import exit_kernels as kernels
from services.verifier.engine.device_head import DeviceHead
from services.verifier.engine.exit_head import CHUNK, SHORTLIST
from services.verifier.engine.exit_modules import FEATURES, ExitModule, TrainedExit
from services.verifier.engine.ranking import RANK_FIELDS

MOST_CHUNKS: Final = 4096
SCORE_WARPS: Final = 8
"""That score a row."""
LEAST_TALL: Final = 16
TALLEST: Final = 128
"""Rows of a program that multiplies by the rough head: a power of two."""
DEEP: Final = 64
"""Dimensions that it takes at a time."""
FEW_ROWS: Final = 128
"""Rows that a device of today scores at once, one a multiprocessor."""
SHARED_REGISTERS: Final = 128
"""That a thread which scores has at most where there are more, so that two programs fit a multiprocessor."""


@dataclass(frozen=True, slots=True)
class _Judge:
    """A judge's matrices; `taken` [vocabulary, rank] is what it sees of each token, for the whole vocabulary."""

    rank: int
    width: int
    taken: Tensor
    first: Tensor
    first_bias: Tensor
    last: Tensor
    last_bias: Tensor
    judgement: Tensor
    has_judgement: bool


class FusedExit:
    """One exit on a CUDA device; see `gather` and `outcomes`."""

    def __init__(
        self, module: ExitModule, head: DeviceHead, norm_weight: Tensor, epsilon: float, outcomes: int
    ) -> None:
        """`norm_weight` [hidden size] and `epsilon` are the model's last norm's; `outcomes` are ranked a block."""
        trained = module if isinstance(module, TrainedExit) else None
        self._head, self._norm_weight, self._epsilon = head, norm_weight, epsilon
        self._size, self._outcomes = len(norm_weight), outcomes
        self._calibration = module.calibration
        # half as much to write and read; the sum is of what is written
        self._rough_type = torch.float32 if head.rough.dtype is torch.float32 else torch.float16
        self._adapter_weight, self._adapter_epsilon = norm_weight, epsilon
        self._gate_up = self._down = None
        self._judge: _Judge | None = None
        states: list[Tensor] = [] if head.reduce is None else [head.reduce]
        if trained is not None:
            self._adapter_weight, self._adapter_epsilon = (
                trained.norm.weight.detach(),
                float(trained.norm.eps or 0.0),
            )
            self._gate_up = torch.cat((trained.gate.weight, trained.up.weight)).detach().contiguous()
            self._down = trained.down.weight.detach()
            self._judge = _judge(trained, head)
            states.append(trained.judge.state.weight.detach())
        self._small = torch.cat([each.to(head.weight.dtype) for each in states]) if states else None
        self._state_at = 0 if head.reduce is None else len(head.reduce)

    @staticmethod
    def serves(head: DeviceHead, most_outcomes: int) -> bool:
        """Whether the kernels take a head: one of a vocabulary that fits, and few outcomes."""
        return cdiv(len(head.rough), CHUNK) <= MOST_CHUNKS and most_outcomes < SHORTLIST

    def gather(self, hidden: Tensor, residual: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream's rows at `places` [rows], and their norm for the adapter, each [rows, hidden size]."""
        own = torch.empty((len(places), self._size), dtype=hidden.dtype, device=hidden.device)
        normed = torch.empty_like(own)
        kernels.gather[(len(places),)](
            hidden, residual, places, self._adapter_weight, own, normed,
            self._size, self._adapter_epsilon, next_power_of_2(self._size), num_warps=8,
        )  # fmt: skip
        return own, normed

    def outcomes(
        self, own: Tensor, normed: Tensor, drafts: Tensor, sure: Tensor, lengths: Tensor, width: int
    ) -> Tensor:
        """What the exit foresees `[blocks, outcomes, RANK_FIELDS]`, int32; see `GraphExits.outcomes`. `own` is used up."""
        rows, device, size = len(own), own.device, self._size
        if self._gate_up is not None and self._down is not None:
            both = normed @ self._gate_up.T
            inner = both.shape[1] // 2
            act = torch.empty((rows, inner), dtype=own.dtype, device=device)
            kernels.gated[(rows, cdiv(inner, 1024))](both, act, inner, 1024)
            own.addmm_(act, self._down.T)
            kernels.norm[(rows,)](
                own, self._norm_weight, normed, size, self._epsilon, next_power_of_2(size), num_warps=8
            )
        head, judge = self._head, self._judge
        small = normed if self._small is None else normed @ self._small.T
        columns = len(head.rough)
        chunks = cdiv(columns, CHUNK)
        rough = torch.empty((rows, columns), dtype=self._rough_type, device=device)
        best = torch.empty((rows, chunks), dtype=torch.float32, device=device)
        total = torch.empty_like(best)
        tall = min(TALLEST, max(LEAST_TALL, next_power_of_2(rows)))
        kernels.rough_logits[(cdiv(rows, tall), chunks)](
            normed if head.reduce is None else small, head.rough, rough, best, total,
            rows, size if head.reduce is None else small.shape[1], head.rough.shape[1],
            columns, chunks, CHUNK, tall, DEEP,
            num_warps={16: 2, 128: 8}.get(tall, 4), num_stages=3 if tall > 64 else 2,
        )  # fmt: skip
        named = self._outcomes + 1
        tokens = torch.empty((rows, named), dtype=torch.int32, device=device)
        log_probs = torch.empty((rows, named), dtype=torch.float32, device=device)
        drafted = torch.empty(rows, dtype=torch.float32, device=device)
        accepted = torch.empty_like(drafted)
        filler = drafted
        accept = self._calibration.accept
        kernels.score[(rows,)](
            rough, best, total, normed, small, drafts, sure,
            tokens if head.ids is None else head.ids, head.weight,
            judge.taken if judge else filler, judge.first if judge else filler,
            judge.first_bias if judge else filler, judge.last if judge else filler,
            judge.last_bias if judge else filler, judge.judgement if judge else filler,
            tokens, log_probs, drafted, accepted,
            columns, chunks, CHUNK, max(SHORTLIST, next_power_of_2(chunks)),
            SHORTLIST, named, size, next_power_of_2(size), min(256 * SCORE_WARPS, next_power_of_2(size)),
            small.shape[1], self._state_at,
            judge.rank if judge else 1, next_power_of_2(judge.rank) if judge else 1,
            judge.width if judge else 1, next_power_of_2(judge.width) if judge else 1, FEATURES,
            head.tail, accept.slope, accept.offset,
            head.ids is not None, judge is not None, bool(judge and judge.has_judgement),
            num_warps=SCORE_WARPS, maxnreg=SHARED_REGISTERS if rows > FEW_ROWS else None,
        )  # fmt: skip
        blocks = rows // width
        out = torch.empty((blocks, self._outcomes, RANK_FIELDS), dtype=torch.int32, device=device)
        outcome = self._calibration.outcome
        kernels.rank[(blocks,)](
            drafted, accepted, drafts, lengths, tokens, log_probs, out,
            width, next_power_of_2(width), named, next_power_of_2(named),
            self._outcomes, max(2, next_power_of_2(self._outcomes)),
            outcome.slope, outcome.offset, (outcome.slope, outcome.offset) != (1.0, 0.0),
            num_warps=1,
        )  # fmt: skip
        return out


def _judge(trained: TrainedExit, head: DeviceHead) -> _Judge:
    judge, weights = trained.judge, trained.calibration.judgement
    device = head.weight.device
    return _Judge(
        rank=len(judge.state.weight),
        width=len(judge.first.weight),
        taken=(head.weight @ judge.token.weight.detach().to(head.weight.dtype).T).contiguous(),
        first=judge.first.weight.detach().contiguous(),
        first_bias=judge.first.bias.detach(),
        last=judge.last.weight.detach().flatten().contiguous(),
        last_bias=judge.last.bias.detach(),
        judgement=torch.tensor(weights or (0.0,), device=device),
        has_judgement=bool(weights),
    )
