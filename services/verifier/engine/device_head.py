"""The LM head as exits use it inside a CUDA graph; what `exit_head` is on a CPU.

With fewer dimensions (`Naming.reduce`) a rough product finds a shortlist, and exact logits are computed for that alone:
a target's whole head is as much memory to read as one or two of its layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from services.verifier.engine.exit_head import EDGE, SHORTLIST, Naming, Scores, largest
from shared.sampling.rules import Row


class DeviceHead:
    """A plain head (logits are a product and nothing else) on the model's device."""

    def __init__(self, weight: Tensor, naming: Naming = Naming()) -> None:
        """`weight` `[vocabulary, hidden size]` is the model's own."""
        device, dtype = weight.device, weight.dtype
        self.weight = weight
        self.ids = None if naming.vocabulary is None else naming.vocabulary.to(device)
        self.tail = naming.tail if naming.reduce is not None else 0.0
        named = weight if self.ids is None else weight[self.ids]
        self.reduce: Tensor | None = None
        if naming.reduce is not None and naming.restore is not None:
            self.reduce = naming.reduce.to(device, dtype)
            named = (named.float() @ naming.restore.to(device).float()).to(dtype)
        self.rough = named

    def __call__(self, hidden: Tensor, drafts: Tensor, k: int, draws: Sequence[Row | None] = ()) -> Scores:
        """See `ExitHead`; rows are scored as in greedy decoding, whatever `draws` say."""
        rough = product(hidden if self.reduce is None else hidden @ self.reduce.T, self.rough)
        columns = largest(rough, k if self.reduce is None else max(SHORTLIST, k))
        tokens = columns if self.ids is None else self.ids[columns]
        rows = functional.embedding(torch.cat((tokens, drafts[:, None]), dim=1), self.weight)
        logits = _products(rows, hidden)
        exact, drafted = logits[:, :-1], logits[:, -1]
        total = self._total(rough, columns, exact)
        best, order = (exact - total).topk(k, dim=-1)
        return Scores(tokens.gather(1, order), best, drafted - total[:, 0], rows[:, -1])

    def _total(self, rough: Tensor, columns: Tensor, exact: Tensor) -> Tensor:
        """`[rows, 1]`: the logarithm of the normalising sum, in which exact logits `[rows, n]` take the place of the rough
        ones at `columns`, and less of it near the shortlist's edge."""
        listed = rough.gather(1, columns)
        kept = ((listed - listed.amin(dim=1, keepdim=True)) / EDGE).clamp(max=1.0)
        mixed = torch.logaddexp(exact - self.tail + kept.log(), listed + torch.log1p(-kept))
        return rough.scatter(1, columns, mixed).logsumexp(dim=-1, keepdim=True) + self.tail


def product(values: Tensor, matrix: Tensor) -> Tensor:
    """`values @ matrix.T` in float32."""
    if values.is_cuda and values.dtype is not torch.float32:
        return torch.mm(values, matrix.T, out_dtype=torch.float32)
    return values.float() @ matrix.T.float()


def _products(rows: Tensor, hidden: Tensor) -> Tensor:
    """`[n, r]`: of each `hidden` `[n, size]` with its own `rows` `[n, r, size]`, in float32."""
    if rows.is_cuda and rows.dtype is not torch.float32:
        return torch.bmm(rows, hidden[:, :, None], out_dtype=torch.float32)[:, :, 0]
    return (rows.float() @ hidden.float()[:, :, None])[:, :, 0]
