"""The target's own draws: which token each verified row yields, decided before vLLM's sampler looks at it.

vLLM is asked for greedy decoding always. Where a request's tokens are drawn otherwise, the token that its sampling
parameters and its noise choose is made the largest logit of its row, and vLLM's rejection sampler, which compares drafts
with the largest, then judges by equality. Requests that decode greedily without penalties are left alone.

In ratio mode the block's outcome is found first (`shared.sampling.ratio`), and rows up to the deciding one are marked so
that vLLM finds the same: the drafted tokens that hold, and the one that follows them.

Log-probabilities are those of the logits as the model gave them (vLLM's `raw_logprobs`), so they are read off after the
rows are as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors

from shared.protocol import Tokens
from shared.sampling import logits as sampling
from shared.sampling import ratio
from shared.sampling.logits import Ints
from shared.sampling.rules import Row, Rules
from shared.sampling.sparse import SparseRow


@dataclass(frozen=True, slots=True)
class DrawnRows:
    """A request's rows in a pass: `first` and one for each token of its `block`, and one more. `tokens` are those before
    the block, prompt and output; `drawn_from` is what the block's were drawn from in ratio mode, nothing where none was."""

    rules: Rules
    first: int
    tokens: Ints
    block: Tokens
    drawn_from: Sequence[SparseRow] = ()

    def rows(self) -> list[Row]:
        """What each row is the continuation of: the block's earlier tokens count as said."""
        text = np.concatenate((self.tokens, np.array(self.block, dtype=np.int64)))
        known = len(self.tokens)
        return [Row(self.rules, text[: known + n]) for n in range(len(self.block) + 1)]


def decide(logits: Tensor, requests: Sequence[DrawnRows]) -> tuple[Tensor, Tensor]:
    """Rows of `logits` [rows, vocabulary] and the token that each yields. Rows that no outcome hangs on are left out."""
    keyed = [request for request in requests if not request.rules.ratio]
    indexes = [index for drawn in keyed for index in range(drawn.first, drawn.first + len(drawn.block) + 1)]
    rows = [row for drawn in keyed for row in drawn.rows()]
    yielded = sampling.draw(_values(logits, indexes), rows).tolist() if keyed else []
    for request in requests:
        if request.rules.ratio:
            said = _judged(logits, request)
            indexes += range(request.first, request.first + len(said))
            yielded += said
    return torch.tensor(indexes, device=logits.device), torch.tensor(yielded, device=logits.device)


def _judged(logits: Tensor, request: DrawnRows) -> list[int]:
    """What a request says in ratio mode: the drafted tokens that hold, and the next one."""

    def row(number: int) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32]
        (found,) = _values(logits, [request.first + number])
        return found

    accepted, next_token = ratio.judge(row, request.rows(), request.block, request.drawn_from)
    return [*request.block[:accepted], next_token]


def _values(logits: Tensor, rows: Sequence[int]) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = logits[torch.tensor(rows, device=logits.device)].float().cpu().numpy()
    return found


class Mark:
    """Rows of logits whose largest is made another one, for the time that a sampler looks at them."""

    def __init__(self, logits: Tensor, requests: Sequence[DrawnRows]) -> None:
        self._logits = logits
        self._at = decide(logits, requests)
        self._before = logits[self._at]
        logits[self._at] = torch.finfo(logits.dtype).max

    def undo(self) -> None:
        """Make the logits what they were."""
        self._logits[self._at] = self._before


def raw_logprobs(
    logits: Tensor, sampled: Tensor, lengths: Sequence[int], asked: Sequence[int | None]
) -> LogprobsTensors:
    """Log-probabilities, ranks and likeliest tokens of what was sampled, as vLLM's sampler returns them.

    `sampled` [requests, n] are token ids, -1 behind a request's last one; `lengths` says how many rows of `logits` each
    request has, `asked` how many of the likeliest tokens it wants (None: it wants nothing, and gets zeros).
    """
    requests, width = sampled.shape
    most = max((count for count in asked if count is not None), default=0)
    tokens = torch.zeros((requests, width, most + 1), dtype=torch.int32)
    logprobs = torch.zeros((requests, width, most + 1))
    ranks = torch.zeros((requests, width), dtype=torch.long)
    first = 0
    for index, length in enumerate(lengths):
        if asked[index] is not None:
            said = sampled[index][sampled[index] >= 0].long()
            found = logits[first : first + len(said)].float().log_softmax(dim=-1)
            own = found.gather(1, said[:, None])
            best = found.topk(most, dim=-1)
            tokens[index, : len(said)] = torch.cat((said[:, None], best.indices), dim=1).int()
            logprobs[index, : len(said)] = torch.cat((own, best.values), dim=1)
            ranks[index, : len(said)] = (found >= own).sum(dim=-1)
        first += length
    return LogprobsTensors(tokens.flatten(0, 1), logprobs.flatten(0, 1), ranks.flatten())
