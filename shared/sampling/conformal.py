"""How many tokens of a draft's distribution travel, chosen token by token so that little of it is given up on average.

C-SQS (Bhattacharjee, Tian, Zhong, Zhang, Simeone and Tandon, "Conformal Sparsification for Bandwidth-Efficient
Edge-Cloud Speculative Decoding", arXiv 2510.09942): a row keeps the tokens that are at least as likely as a threshold
beta. Where the draft is sure these are few, where it is not they are many. After each row the threshold moves against
what the row has given up (online conformal prediction: Gibbs and Candès, arXiv 2106.00170):

    beta_{t+1} = beta_t - eta (alpha_t - alpha)

with alpha_t the probability that row t dropped, alpha what it should be on average, and eta > 0. Summed over T rows,

    1/T Σ alpha_t = alpha + (beta_1 - beta_{T+1}) / (eta T) <= alpha + (beta_1 + eta) / (eta T),

whatever the rows are: a threshold below zero drops nothing, so that the next one is higher, and none falls below -eta.
A threshold may be held down to `highest`, here: it is then lower than the sum says, and the bound holds all the more.
It is, because rows that drop nothing at any threshold (the draft is sure) would raise it without end, and the rows
after them pay for it.

The state is one number, that of a path of tokens: what the threshold is after the rows along it. So it is kept with
the draft that made the rows, one number after each, and a lane that assumes n accepted tokens and another one starts
from the number after row n (the rejected row is one that was sent and tried, and counts) or after the last row, if all
are accepted. Rows behind a rejected one never count, nor do tokens that no row was made for (looked up, or said by the
target). The sum above is then over the rows along the committed path, each once and in order: rolling back the tokens
rolls back the sum, and the bound holds for what was committed. It does not need the rows to be independent of what was
accepted; and the threshold depends on nothing but rows before it, so that q never knows the noise that it is drawn
with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shared.sampling.sparse import Candidate, above, top


class Sparsity(Protocol):
    """How much of a draft's row travels. Its state is a threshold, `first` at first; see above."""

    @property
    def first(self) -> float:
        """The threshold of the first row."""
        ...

    def keep(self, candidates: Sequence[Candidate], threshold: float) -> list[Candidate]:
        """What is kept of a row, of the likeliest tokens, likeliest first."""
        ...

    def after(self, threshold: float, dropped: float) -> float:
        """The threshold after a row that dropped so much."""
        ...


@dataclass(frozen=True, slots=True)
class ConformalRule:
    """The constants above: `target` is alpha, `rate` eta, `first` beta_1; probabilities all of them.

    The defaults are for the pair that ships, found on some of the dev prompts (`scripts/bench sampling`): with less dropped
    acceptance hardly rises, and a threshold that moves slowly from a good start gets more of it for its bytes than one that
    makes every short answer drop the same.

    `ValueError` when they are none.
    """

    target: float = 0.1
    rate: float = 0.01
    first: float = 0.03
    highest: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 < self.target < 1.0 or self.rate <= 0.0 or not 0.0 <= self.first <= self.highest <= 1.0:
            raise ValueError(f"{self} should have 0 < target < 1, 0 < rate and 0 <= first <= highest <= 1")

    def keep(self, candidates: Sequence[Candidate], threshold: float) -> list[Candidate]:
        """See `Sparsity`."""
        return above(candidates, threshold)

    def after(self, threshold: float, dropped: float) -> float:
        """See `Sparsity`."""
        return min(self.highest, threshold - self.rate * (dropped - self.target))

    def bound(self, rows: int) -> float:
        """What so many rows drop at most, on average."""
        return self.target + (self.first + self.rate) / (self.rate * rows)


@dataclass(frozen=True, slots=True)
class FixedCount:
    """The same number of tokens in every row (the paper's K-SQS): there is no state."""

    count: int
    first: float = 0.0

    def keep(self, candidates: Sequence[Candidate], threshold: float) -> list[Candidate]:
        """See `Sparsity`."""
        return top(candidates, self.count)

    def after(self, threshold: float, dropped: float) -> float:
        """See `Sparsity`."""
        return threshold


def resumed(first: float | None, after: tuple[float, ...], accepted: int) -> float | None:
    """The threshold for what follows `accepted` tokens of a block and another one, see above.

    `first` is the threshold that the block started from (None where no row was ever made), `after` those after each of
    its rows.
    """
    if not after:
        return first
    return after[min(accepted, len(after) - 1)]
