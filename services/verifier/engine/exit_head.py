"""The LM head as the exits use it: not all logits, but each row's most likely tokens and the drafts' probabilities.

On a CPU the head is most of what an exit costs (49152 × 576 floats, read from memory once an exit), and next to nothing
of it is wanted. `ShortlistHead` reads an int8 copy to find a shortlist and computes exact logits for that alone; a
sixth of the time, and the same answers but for what int8 adds to the tail of the normalising sum. `ExactHead` computes
everything, wherever there is no int8 kernel or the logits are not a plain product.

Where the target draws its tokens at random, an exit foresees the draw: its logits get the same processing and the same
noise as the target's will (`shared.sampling`), and scores are those of perturbed logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from services.verifier.engine.int8 import Int8Matrix, has_int8
from shared.sampling import logits as sampling
from shared.sampling.logits import Vocabulary
from shared.sampling.rules import Row

SHORTLIST: Final = 16
ROUGH_SHORTLIST: Final = 40
"""The same where the head is read in fewer dimensions."""
EDGE: Final = 0.2
"""By so much a rough logit is above the shortlist's lowest before the exact one takes its place wholly. Which of two nearly
equal tokens is the list's last is a matter of rounding; what it stands for in the normalising sum is not, then."""
LEAST_LOG_PROB: Final = -40.0
"""That of a token which truncation forbids."""
CHUNK: Final = 64
"""Columns whose largest value is found first, when the largest of all are sought."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Per row: the `k` most likely tokens, best first, with their log-probabilities; the log-probability of the draft's
    token, and its row of the head `[rows, hidden size]`."""

    tokens: Tensor
    log_probs: Tensor
    drafted: Tensor
    draft_rows: Tensor


@dataclass(frozen=True, slots=True)
class Naming:
    """Which tokens exits name, and perhaps how to find the likeliest of them in fewer dimensions.

    `vocabulary` are token ids, None for all. With `reduce` [r, hidden size] and `restore` [hidden size, r], head · restore ·
    reduce comes near the head on the hidden states that exits see; `tail` is what the logarithm of a sum of such
    probabilities lacks, on average.
    """

    vocabulary: Tensor | None = None
    reduce: Tensor | None = None
    restore: Tensor | None = None
    tail: float = 0.0


class ExitHead(Protocol):
    """From a guess of the last layer's (normed) output to scores."""

    def __call__(self, hidden: Tensor, drafts: Tensor, k: int, draws: Sequence[Row | None] = ()) -> Scores:
        """`hidden` [rows, hidden size]; `drafts` [rows] token ids, whatever they are where there is no draft.

        `draws` say of each row how its token is drawn, None for greedy decoding; it is empty where all decode greedily.
        """


class NamingHead(ExitHead, Protocol):
    """One that can name the likeliest token alone, which takes less."""

    def likeliest(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest token of each row, greedily, and its probability: each `[rows]`."""


class ExactHead:
    """The model's own head, in full."""

    def __init__(self, logits: Callable[[Tensor], Tensor], weight: Tensor, naming: Naming = Naming()) -> None:
        """`logits` is what the model makes of hidden states, by `weight` [vocabulary, hidden size] and whatever else."""
        self._logits = logits
        self._weight = weight
        self._ids = None if naming.vocabulary is None else naming.vocabulary.to(weight.device)
        self._drawn = _DrawnScores(weight, naming)

    def __call__(self, hidden: Tensor, drafts: Tensor, k: int, draws: Sequence[Row | None] = ()) -> Scores:
        """See `ExitHead`."""
        return (
            _mixed(hidden, drafts, k, draws, self._greedy, self._draw)
            if draws
            else self._greedy(hidden, drafts, k)
        )

    def likeliest(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See `ExitHead`."""
        logits = self._logits(hidden).float()
        named = logits if self._ids is None else logits[:, self._ids]
        best, column = named.softmax(dim=-1).max(dim=-1)
        return (column if self._ids is None else self._ids[column]), best

    def _draw(self, hidden: Tensor, drafts: Tensor, k: int, rows: Sequence[Row]) -> Scores:
        logits = self._logits(hidden).float()
        rough = logits if self._ids is None else logits[:, self._ids]
        return self._drawn(rough, lambda tokens: logits.gather(1, tokens), drafts, k, rows, shortlist=k)

    def _greedy(self, hidden: Tensor, drafts: Tensor, k: int) -> Scores:
        logits = self._logits(hidden).float()
        named = logits if self._ids is None else logits[:, self._ids]
        total = named.logsumexp(dim=-1, keepdim=True)
        best, columns = named.topk(min(k, named.shape[-1]), dim=-1)
        tokens = columns if self._ids is None else self._ids[columns]
        drafted = (logits.gather(1, drafts[:, None]) - total).squeeze(1)
        return Scores(tokens, best - total, drafted, self._weight[drafts])


class ShortlistHead:
    """An int8 copy of the head, perhaps in fewer dimensions, for the shortlist; the head itself for what is on it."""

    def __init__(self, weight: Tensor, naming: Naming = Naming()) -> None:
        """`weight` is the head's, [vocabulary, hidden size], float32; it is kept, not copied."""
        self._weight = weight
        self._ids = naming.vocabulary
        self._reduce = naming.reduce
        self._tail = naming.tail if naming.reduce is not None else 0.0
        self._shortlist = SHORTLIST if naming.reduce is None else ROUGH_SHORTLIST
        named = weight if naming.vocabulary is None else weight[naming.vocabulary]
        self._rough = Int8Matrix(named if naming.restore is None else named @ naming.restore)
        self._drawn = _DrawnScores(weight, naming)

    def __call__(self, hidden: Tensor, drafts: Tensor, k: int, draws: Sequence[Row | None] = ()) -> Scores:
        """See `ExitHead`."""
        return (
            _mixed(hidden, drafts, k, draws, self._greedy, self._draw)
            if draws
            else self._greedy(hidden, drafts, k)
        )

    def likeliest(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See `ExitHead`. The shortlist is compared exactly; the sum is the rough copy's, but for these."""
        rough = self._rough(hidden if self._reduce is None else hidden @ self._reduce.T)
        columns = largest(rough, self._shortlist)
        some = rough.gather(1, columns)
        tokens = columns if self._ids is None else self._ids[columns]
        rows = functional.embedding(tokens, self._weight)
        exact = torch.bmm(rows, hidden[:, :, None])[:, :, 0]
        total = rough.logsumexp(dim=-1)
        others = (1.0 - (some - total[:, None]).exp().sum(dim=-1)).clamp(min=1e-6).log() + total + self._tail
        best, place = exact.max(dim=-1)
        total = torch.logaddexp(exact.logsumexp(dim=-1), others)
        return tokens.gather(1, place[:, None])[:, 0], (best - total).exp()

    def _draw(self, hidden: Tensor, drafts: Tensor, k: int, rows: Sequence[Row]) -> Scores:
        rough = self._rough(hidden if self._reduce is None else hidden @ self._reduce.T)

        def exact(tokens: Tensor) -> Tensor:
            weights = functional.embedding(tokens, self._weight)
            return torch.bmm(hidden[:, None], weights.transpose(1, 2))[:, 0]

        return self._drawn(rough, exact, drafts, k, rows, shortlist=max(self._shortlist, 2 * k))

    def _greedy(self, hidden: Tensor, drafts: Tensor, k: int) -> Scores:
        """The normalising sum is the rough copy's, in which exact logits take the place of the shortlist's."""
        rough = self._rough(hidden if self._reduce is None else hidden @ self._reduce.T)
        shortlist = largest(rough, max(self._shortlist, 2 * k))
        tokens = shortlist if self._ids is None else self._ids[shortlist]
        rows = functional.embedding(torch.cat((tokens, drafts[:, None]), dim=1), self._weight)
        logits = torch.bmm(hidden[:, None], rows.transpose(1, 2))[:, 0]
        exact, drafted = logits[:, :-1], logits[:, -1]
        rough.scatter_(1, shortlist, exact - self._tail)
        log_probs = torch.log_softmax(rough, dim=-1, out=rough).gather(1, shortlist)
        best, order = log_probs.topk(k, dim=-1)
        return Scores(tokens.gather(1, order), best, drafted - exact[:, 0] + log_probs[:, 0], rows[:, -1])


class _DrawnScores:
    """Scores of perturbed logits. A draft's token is judged whether exits name it or not."""

    def __init__(self, weight: Tensor, naming: Naming) -> None:
        self._weight = weight
        self._named = None if naming.vocabulary is None else Vocabulary(naming.vocabulary.cpu().numpy())

    def __call__(
        self,
        rough: Tensor,
        exact: Callable[[Tensor], Tensor],
        drafts: Tensor,
        k: int,
        rows: Sequence[Row],
        *,
        shortlist: int,
    ) -> Scores:
        """`rough` [rows, named tokens] are logits that find the shortlist, `exact` gives those of tokens [rows, n]."""
        vocabulary, asked = self._named, drafts.cpu().numpy()
        if vocabulary is not None:
            unnamed = np.unique(asked[vocabulary.columns(asked) < 0])
            if len(unnamed):
                more = torch.from_numpy(unnamed).to(drafts.device).expand(len(drafts), -1)
                rough = torch.cat((rough, exact(more)), dim=1)
                vocabulary = vocabulary.with_more(unnamed)
            asked = vocabulary.columns(asked)
        found = sampling.best(rough.cpu().numpy(), rows, shortlist, vocabulary, asked=asked, sure=k)
        columns = torch.from_numpy(np.concatenate((found.columns, asked[:, None]), axis=1)).to(rough.device)
        tokens = columns if vocabulary is None else torch.from_numpy(vocabulary.ids).to(rough.device)[columns]
        missed = exact(tokens) - rough.gather(1, columns)
        values = torch.from_numpy(found.values).to(rough) + missed[:, :-1]
        total = torch.from_numpy(found.total).to(rough)[:, None]
        drafted = torch.from_numpy(found.asked).to(rough) + missed[:, -1]
        best, order = values.topk(k, dim=-1)
        return Scores(
            tokens[:, :-1].gather(1, order),
            (best - total).clamp(LEAST_LOG_PROB, 0.0),
            (drafted - total[:, 0]).clamp(LEAST_LOG_PROB, 0.0),
            self._weight[drafts],
        )


def _mixed(
    hidden: Tensor,
    drafts: Tensor,
    k: int,
    draws: Sequence[Row | None],
    greedy: Callable[[Tensor, Tensor, int], Scores],
    draw: Callable[[Tensor, Tensor, int, Sequence[Row]], Scores],
) -> Scores:
    """The scores of rows of which some are drawn at random and others are not."""
    rows = [row for row in draws if row is not None]
    if len(rows) == len(draws):
        return draw(hidden, drafts, k, rows)
    drawn = torch.tensor([row is not None for row in draws], device=hidden.device)
    random, plain = draw(hidden[drawn], drafts[drawn], k, rows), greedy(hidden[~drawn], drafts[~drawn], k)
    order = torch.cat((drawn.nonzero()[:, 0], (~drawn).nonzero()[:, 0])).argsort()
    return Scores(
        torch.cat((random.tokens, plain.tokens))[order],
        torch.cat((random.log_probs, plain.log_probs))[order],
        torch.cat((random.drafted, plain.drafted))[order],
        torch.cat((random.draft_rows, plain.draft_rows))[order],
    )


def can_shortlist(weight: Tensor) -> bool:
    """Whether `ShortlistHead` works for a head: float32 on a CPU, and large enough to be worth it."""
    return has_int8(weight) and len(weight) >= 64 * SHORTLIST


def best_head(
    logits: Callable[[Tensor], Tensor], weight: Tensor, naming: Naming, *, plain: bool = True
) -> NamingHead:
    """The quickest head for a weight; `plain`: the logits are a product with it and nothing else."""
    if plain and can_shortlist(weight):
        return ShortlistHead(weight, naming)
    return ExactHead(logits, weight, naming)


def largest(values: Tensor, count: int) -> Tensor:
    """The columns of the `count` largest of each row, in no order. They lie in the `count` chunks with the largest maxima:
    to look there is a fraction of sorting all."""
    rows, columns = values.shape
    chunks = columns // CHUNK
    if columns % CHUNK or chunks <= count:
        return values.topk(count, dim=-1).indices
    places = values.view(rows, chunks, CHUNK).amax(dim=-1).topk(count, dim=-1, sorted=False).indices
    starts = torch.arange(0, rows * chunks, chunks, device=values.device)[:, None]
    found = functional.embedding(starts + places, values.view(-1, CHUNK)).flatten(1)
    best = found.topk(count, dim=-1, sorted=False).indices
    return (places * CHUNK).gather(1, best // CHUNK) + best % CHUNK
