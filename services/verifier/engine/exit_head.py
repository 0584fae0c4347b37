"""The LM head as the exits use it: not all logits, but each row's most likely tokens and the drafts' probabilities.

On a CPU the head is most of what an exit costs (49152 × 576 floats, read from memory once an exit), and next to nothing
of it is wanted. `ShortlistHead` reads an int8 copy to find a shortlist and computes exact logits for that alone; a
sixth of the time, and the same answers but for what int8 adds to the tail of the normalising sum. `ExactHead` computes
everything, wherever there is no int8 kernel or the logits are not a plain product.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor

SHORTLIST: Final = 16
INT8_ENGINE: Final = "fbgemm"


@dataclass(frozen=True, slots=True)
class Scores:
    """Per row: the `k` most likely tokens, best first, with their log-probabilities, and the draft's log-probability."""

    tokens: Tensor
    log_probs: Tensor
    drafted: Tensor


class ExitHead(Protocol):
    """From a guess of the last layer's (normed) output to scores."""

    def __call__(self, hidden: Tensor, drafts: Tensor, k: int) -> Scores:
        """`hidden` [rows, hidden size]; `drafts` [rows] token ids, whatever they are where there is no draft."""

    def rows(self, tokens: Tensor) -> Tensor:
        """The head's rows of these tokens, `[…, hidden size]`."""


class ExactHead:
    """The model's own head, in full; with a `vocabulary` it names these tokens only."""

    def __init__(
        self, logits: Callable[[Tensor], Tensor], weight: Tensor, vocabulary: Tensor | None = None
    ) -> None:
        """`logits` is what the model makes of hidden states, by `weight` [vocabulary, hidden size] and whatever else."""
        self._logits = logits
        self._weight = weight
        self._ids = None if vocabulary is None else vocabulary.to(weight.device)

    def __call__(self, hidden: Tensor, drafts: Tensor, k: int) -> Scores:
        """See `ExitHead`."""
        logits = self._logits(hidden).float()
        named = logits if self._ids is None else logits[:, self._ids]
        total = named.logsumexp(dim=-1, keepdim=True)
        best, columns = named.topk(min(k, named.shape[-1]), dim=-1)
        tokens = columns if self._ids is None else self._ids[columns]
        return Scores(tokens, best - total, (logits.gather(1, drafts[:, None]) - total).squeeze(1))

    def rows(self, tokens: Tensor) -> Tensor:
        """See `ExitHead`."""
        return self._weight[tokens]


class ShortlistHead:
    """An int8 copy of the head for the shortlist, the head itself for what is on it."""

    def __init__(self, weight: Tensor, vocabulary: Tensor | None = None) -> None:
        """`weight` is the head's, [vocabulary, hidden size], float32; it is kept, not copied. With a `vocabulary` only
        these tokens are named."""
        self._weight = weight
        self._ids = vocabulary
        self._packed = _pack(weight if vocabulary is None else weight[vocabulary])

    def __call__(self, hidden: Tensor, drafts: Tensor, k: int) -> Scores:
        """See `ExitHead`. The normalising sum is int8's, with the shortlist's share replaced by the exact one."""
        rough = torch.ops.quantized.linear_dynamic(hidden, self._packed, True)
        total = rough.logsumexp(dim=-1, keepdim=True)
        rough_best, shortlist = rough.topk(max(SHORTLIST, 2 * k), dim=-1)
        if self._ids is not None:
            shortlist = self._ids[shortlist]
        exact = torch.einsum("rh,rsh->rs", hidden, self._weight[shortlist])
        on_list = (rough_best - total).logsumexp(dim=-1, keepdim=True).clamp(max=-1e-6)
        tail = total + torch.log(-torch.expm1(on_list))
        total = torch.logaddexp(exact.logsumexp(dim=-1, keepdim=True), tail)
        best, order = exact.topk(k, dim=-1)
        drafted = (hidden * self._weight[drafts]).sum(dim=-1, keepdim=True) - total
        return Scores(shortlist.gather(1, order), best - total, drafted.squeeze(1))

    def rows(self, tokens: Tensor) -> Tensor:
        """See `ExitHead`."""
        return self._weight[tokens]


def can_shortlist(weight: Tensor) -> bool:
    """Whether `ShortlistHead` works for a head: float32 on an x86 CPU, and large enough to be worth it."""
    plain = weight.device.type == "cpu" and weight.dtype is torch.float32 and len(weight) >= 64 * SHORTLIST
    return plain and INT8_ENGINE in torch.backends.quantized.supported_engines


def _pack(weight: Tensor) -> Any:
    """int8 by row, symmetric, in the kernel's layout."""
    torch.backends.quantized.engine = INT8_ENGINE
    scales = weight.abs().amax(dim=1).clamp(min=1e-8) / 127
    zeros = torch.zeros(len(weight), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
        rows = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(rows, None)
