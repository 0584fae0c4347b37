"""The LM head as exits use it inside a CUDA graph; what `exit_head` is on a CPU.

With fewer dimensions (`Naming.reduce`) a rough product finds a shortlist, and exact logits are computed for that alone:
a target's whole head is as much memory to read as one or two of its layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from services.verifier.engine.exit_head import Naming, Scores
from shared.sampling.rules import Row

SHORTLIST: Final = 16
CHUNK: Final = 64


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
        total = rough.logsumexp(dim=-1, keepdim=True)
        best, columns = largest(rough, k if self.reduce is None else max(SHORTLIST, k))
        tokens = columns if self.ids is None else self.ids[columns]
        if self.reduce is None and self.ids is None:
            own = functional.embedding(drafts, self.weight)
            return Scores(tokens, best - total, rough.gather(1, drafts[:, None])[:, 0] - total[:, 0], own)
        on_list = (best - total).logsumexp(dim=-1, keepdim=True).clamp(max=-1e-6)
        tail = total + torch.log(-torch.expm1(on_list)) + self.tail
        rows = functional.embedding(torch.cat((tokens, drafts[:, None]), dim=1), self.weight)
        exact, drafted = torch.split(_products(rows, hidden), [tokens.shape[1], 1], dim=1)
        total = torch.logaddexp(exact.logsumexp(dim=-1, keepdim=True), tail)
        best, order = exact.topk(k, dim=-1)
        return Scores(tokens.gather(1, order), best - total, (drafted - total)[:, 0], rows[:, -1])


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


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row and their columns: of the chunks with the largest maxima, as in `exit_head`."""
    rows, columns = values.shape
    if columns % CHUNK or columns // CHUNK <= count:
        return values.topk(count, dim=-1)
    chunks = values.view(rows, columns // CHUNK, CHUNK)
    places = chunks.amax(dim=-1).topk(count, dim=-1).indices
    found = chunks.gather(1, places[:, :, None].expand(-1, -1, CHUNK)).flatten(1)
    best, place = found.topk(count, dim=-1)
    return best, places.gather(1, place // CHUNK) * CHUNK + place % CHUNK
