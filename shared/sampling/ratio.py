"""Ratio mode: a drafted token is accepted with probability min(1, p/q), else replaced by a draw from the residual.

The classic test of speculative sampling (Leviathan, Kalman and Matias, arXiv 2211.17192; Chen et al., arXiv
2302.01318). With p the target's distribution at a row (temperature, penalties and truncation applied) and q what the
drafted token d was drawn from,

    accept d                 if u q(d) < p(d), u uniform in [0, 1)
    else draw from           max(0, p - q) / Σ max(0, p - q)
    after the last accepted  draw from p

so that token x is said with probability q(x) min(1, p(x)/q(x)) + (1 - Σ min(p, q)) max(0, p - q)(x) / Σ max(0, p - q)
= p(x), whatever q is, as long as d was drawn from just this q. A token that was not drawn but chosen without chance (by
prompt lookup, say) was drawn from q = 1 at d: it is accepted with probability p(d), and the residual is p without d.
That is exact for any d that was fixed before u, so that a row whose q is missing, or 0 at d, is taken so.

**Randomness.** Three streams of the session's noise (`shared.sampling.noise`), each a function of the seed, the choice
and the place of the token in the output: the draft's draw, the test's u, and the residual's draw. A row's own draw from
p is the residual's with q = 0, and uses its stream, as a row has one or the other. The draft's draw depends also on all
output tokens that it follows, assumed ones too (`draft_uniform`), so that lanes which assume different things share no
draw, and a lane that is drafted twice says the same. A block that is verified again, after a preemption or because its
verdict was lost on the way to Redis, gets the same verdict; where a session is restored by a prefill, that says its
first token by itself, which is a token of the floor's.

**Why lanes, forwards, trimmed blocks and the floor change nothing.** The sum above takes d as drawn from q, and u and
the residual's draw as independent of d, *given everything that had a part in choosing this draft for this place*. So
what chooses must not know them. Which draft is verified is decided by:

- its outcome key: a lane is verified when the target has said all that it assumes, which is decided at rows before its
  own, by their noise. The lane's own draws are its own: no lane that assumes otherwise, and no earlier row, has seen
  them, and who drafts it anew, because the lane was dropped, draws the same;
- for a block that is late and trimmed, that its first tokens equal those that were said meanwhile: decided at those
  rows too. The rest of it has draws of its own, and each row is tested by a u of its own;
- which lanes there are at all: hints and guesses start and stop lanes, knowing the draws of the block under way and
  the target's inner view of it, but nothing of a lane that is not drafted. Lanes know of them nothing but the outcome
  that they assume, so that a lane says the same whoever started it, and a hint can change when a token is said, never
  with which probability. A hint that could change the very block it speaks of would break that: the block is fixed
  when it is sent, and what is cut from it later is cut from its front, by what was said (or from its end, at a token
  that a grammar refuses: the row then counts as one that rejected it, not as the target's own draw);
- time: whether the floor speaks first. It draws from p by the residual's stream, which no draft knows. When a draft is
  ready depends on how much there is to compute, which is the same whatever is drawn.

The test is done in float64: a difference of p by rounding moves a probability by as little.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from shared.protocol import Sampling, SamplingMode
from shared.sampling.logits import Vocabulary, draw, place, processed
from shared.sampling.noise import Place, Stream, address, uniform
from shared.sampling.rules import Row, Rules
from shared.sampling.sparse import Candidate, SparseRow, dropped_mass, quantised

Floats = npt.NDArray[Any]

MOST_CANDIDATES: Final = 64
"""Tokens of a draft's row that are looked at: more are worth no bytes."""
SHARE_BITS: Final = 6
"""Of log2 ell, the steps of a draft's probabilities."""


# --- the target's side --------------------------------------------------------------------------------------------


class Decision(NamedTuple):
    """A block's outcome: so many of its tokens hold, and `next_token` follows them."""

    accepted: int
    next_token: int


def judge(
    logits: Callable[[int], Floats],
    rows: Sequence[Row],
    drafted: Sequence[int],
    drawn_from: Sequence[SparseRow],
) -> Decision:
    """A block's outcome, in ratio mode at a temperature above 0.

    `logits(n)` are the target's, `[vocabulary]`, at row n, asked for in order and up to the one that decides; `rows` are
    what each of the K + 1 rows continues; `drawn_from` is what each of the K tokens `drafted` was drawn from, nothing
    where all were chosen without chance. One more is that of a token which the last row excludes (a grammar refuses it),
    so that it is known to be rejected and was left out. `ValueError` when these are not of one length.
    """
    drawn_from = drawn_from or [SparseRow.certain(token) for token in drafted]
    last = len(drafted)
    if not len(rows) - 1 == last <= len(drawn_from) <= last + 1:
        raise ValueError(f"{len(rows)} rows, {len(drafted)} tokens, {len(drawn_from)} distributions")
    for number, (token, told) in enumerate(zip(drafted, drawn_from, strict=False)):
        q = told if told.probability(token) else SparseRow.certain(token)
        row = rows[number]
        p = probabilities(processed(logits(number), row))
        if accepts(p[token], q.probability(token), accept_uniform(place(row))):
            continue
        left = residual(p, dense(q, len(p)))
        left[token] = 0.0  # it is, but where rounding has left nothing: never say what was rejected
        return Decision(number, _drawn(left, row))
    if len(drawn_from) > last:
        p = probabilities(processed(logits(last), rows[last]))
        return Decision(last, _drawn(residual(p, dense(drawn_from[last], len(p))), rows[last]))
    return Decision(last, int(draw(logits(last)[None], [rows[last]])[0]))


def accepts(p: Any, q: Any, number: Any) -> Any:
    """Whether tokens of probabilities `p` and `q` hold, tested by numbers uniform in (0, 1)."""
    return number * q < p


def residual(p: Floats, q: Floats) -> Floats:
    """What is left to draw from where a token was rejected, not normalised, `[…, vocabulary]`.

    p itself where nothing is left: a rejection that only rounding can have caused.
    """
    left = np.maximum(p - q, 0.0)
    found: Floats = np.where(left.sum(axis=-1, keepdims=True) > 0.0, left, p)
    return found


def probabilities(values: Floats) -> Floats:
    """The softmax of processed logits, in float64, `[…, columns]`."""
    shares = np.exp(values.astype(np.float64) - values.max(axis=-1, keepdims=True))
    found: Floats = shares / shares.sum(axis=-1, keepdims=True)
    return found


def dense(row: SparseRow, vocabulary: int) -> Floats:
    """A row over the whole vocabulary."""
    spread = np.zeros(vocabulary)
    spread[list(row.tokens)] = np.array(row.counts) / row.total
    return spread


def _drawn(weights: Floats, row: Row) -> int:
    """The token that the residual's noise picks, with probabilities in proportion to `weights`."""
    sampling = row.rules.sampling
    plain = Sampling(temperature=1.0, seed=sampling.seed, choice=sampling.choice, mode=SamplingMode.RATIO)
    there = Row(Rules(plain, row.rules.prompt_length), row.tokens)
    with np.errstate(divide="ignore"):
        values = np.log(weights)
    return int(draw(values[None], [there])[0])


# --- the draft's side ---------------------------------------------------------------------------------------------

Truncation = Callable[[Sequence[Candidate]], list[Candidate]]
"""From the likeliest tokens, likeliest first, to those that are kept."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A drafted token, what it was drawn from, and how much of the draft's own distribution that gave up. `sure` is the
    probability of the likeliest token."""

    token: int
    row: SparseRow
    dropped: float
    sure: float


def draft_token(
    logits: Floats, row: Row, vocabulary: Vocabulary | None, truncation: Truncation, bits: int = SHARE_BITS
) -> Drawn:
    """Draw a token from a draft's logits `[columns]`, at a temperature above 0: truncated and rounded, then drawn."""
    found = candidates(logits, row, vocabulary)
    kept = truncation(found)
    sparse = quantised(kept, bits)
    number = draft_uniform(place(row), path_number(row.tokens[row.rules.prompt_length :]))
    return Drawn(sparse.draw(number), sparse, dropped_mass(kept), found[0][1])


def candidates(logits: Floats, row: Row, vocabulary: Vocabulary | None) -> list[Candidate]:
    """The likeliest tokens of a row of logits `[columns]` with their probabilities, likeliest first; equally likely ones by
    column."""
    shares = probabilities(processed(logits, row, vocabulary))
    count = min(MOST_CANDIDATES, len(shares))
    best = np.argpartition(-shares, count - 1)[:count]
    best = best[np.lexsort((best, -shares[best]))]
    best = best[shares[best] > 0.0]
    tokens = best if vocabulary is None else vocabulary.ids[best]
    return list(zip(tokens.tolist(), shares[best].tolist(), strict=True))


# --- noise --------------------------------------------------------------------------------------------------------


def accept_uniform(place: Place) -> float:
    """The number in (0, 1) that tests the token at a place (of any stream)."""
    return float(uniform(address(replace(place, stream=Stream.ACCEPT)), np.zeros(1, dtype=np.int64))[0])


def draft_uniform(place: Place, path: int) -> float:
    """The number in (0, 1) that a draft draws the token at a place (of any stream) with, after a `path_number`."""
    return float(uniform(address(replace(place, stream=Stream.DRAFT)), np.array([path]))[0])


def path_number(tokens: Sequence[int] | npt.NDArray[np.int64]) -> int:
    """32 bits that stand for the output tokens so far."""
    return zlib.crc32(np.asarray(tokens, dtype="<u4").tobytes())
