"""A draft's distribution, small enough to travel: a few tokens with whole-numbered shares, and a block of them as bytes.

In ratio mode (`shared.sampling.ratio`) the verifier needs to know what each token was drawn from. The draft truncates
and rounds its distribution *before* it draws, and draws from the result: what travels is then what was drawn from, to
the last bit, and nothing is lost but a little acceptance.

Truncation: a fixed number of the likeliest tokens, or all above a threshold (`shared.sampling.conformal`). Rounding:
the nearest point of the lattice of whole-numbered shares n_i / ell that sum to one (Zhang, Cai, Yu, Popovski and
Simeone, "Quantize-Sample-and-Verify", arXiv 2507.00605; the algorithm is Reznik's, "An algorithm for quantization of
discrete probability distributions", DCC 2011).

The bytes of a block, for K tokens that the reader knows beside them, bits from the highest of each byte on:

    4 bits    log2 ell, 1 to 8
    4 bits    r, the Rice parameter of the gaps
    then for each of the K tokens, with k tokens in its row:
        k              Elias' gamma code
        k - 1 gaps     between the row's other tokens in ascending order (the drawn one is left out: it is known), the
                       first one from -1, less one each: Rice code
        shares         which of the C(ell - 1, k - 1) ways to write ell as an ordered sum of k positive numbers, in the
                       fewest bits that tell them all apart
    and zeros up to a whole byte.

No bytes at all say that every token was certain: drawn from itself alone, as a looked-up token is.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final

from shared.errors import ProtocolError

MOST_BITS: Final = 8
"""Of log2 ell; more than 256 steps of probability are worth no bytes."""
LARGEST_RICE: Final = 15

Candidate = tuple[int, float]
"""A token and its probability."""


@dataclass(frozen=True, slots=True)
class SparseRow:
    """A distribution over token ids: `counts[i] / total` for `tokens[i]`, ascending; zero for all others."""

    tokens: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def certain(cls, token: int, total: int = 1) -> SparseRow:
        """All of it on one token."""
        return cls((token,), (total,))

    @property
    def total(self) -> int:
        """What the counts sum to."""
        return sum(self.counts)

    def probability(self, token: int) -> float:
        """That of one token."""
        at = bisect_left(self.tokens, token)
        known = at < len(self.tokens) and self.tokens[at] == token
        return self.counts[at] / self.total if known else 0.0

    def draw(self, uniform: float) -> int:
        """The token that a number in [0, 1) picks; with just these shares where `total` is a power of two and the number
        is a multiple of a smaller one."""
        place = min(int(uniform * self.total), self.total - 1)
        return self.tokens[bisect_right(list(accumulate(self.counts)), place)]


# --- truncation and rounding --------------------------------------------------------------------------------------


def top(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """The `count` likeliest of `candidates`, which come likeliest first."""
    return list(candidates[:count])


def above(candidates: Sequence[Candidate], threshold: float) -> list[Candidate]:
    """Those of `candidates` (likeliest first) that are at least as likely as `threshold`; the first one in any case."""
    kept = sum(probability >= threshold for _, probability in candidates)
    return list(candidates[: max(1, kept)])


def dropped_mass(kept: Iterable[Candidate]) -> float:
    """The probability that a truncation gave up."""
    return max(0.0, 1.0 - math.fsum(probability for _, probability in kept))


def quantised(candidates: Sequence[Candidate], bits: int) -> SparseRow:
    """The lattice point nearest to `candidates`, scaled to sum to one, with ell = 2^`bits`.

    Shares are rounded, n_i = ⌊ell q_i + ½⌋; what their sum is then too large (too small) by is taken from (given to)
    those that were rounded up (down) furthest, one each. Tokens left without a share are dropped. Equal distances go by
    token id, so that the result is the same everywhere. `ValueError` when there is nothing to scale.
    """
    if not 1 <= bits <= MOST_BITS:
        raise ValueError(f"shares have 1 to {MOST_BITS} bits, not {bits}")
    ell = 1 << bits
    whole = math.fsum(probability for _, probability in candidates)
    if not 0.0 < whole < math.inf or any(probability < 0.0 for _, probability in candidates):
        raise ValueError("a distribution needs probabilities that are not negative and not all zero")
    scaled = sorted((token, ell * probability / whole) for token, probability in candidates)
    counts = [math.floor(share + 0.5) for _, share in scaled]
    excess = sum(counts) - ell
    up = 1 if excess < 0 else -1
    furthest = sorted(range(len(counts)), key=lambda at: up * (counts[at] - scaled[at][1]))
    for at in furthest[: abs(excess)]:
        counts[at] += up
    kept = [(token, count) for (token, _), count in zip(scaled, counts, strict=True) if count]
    return SparseRow(tuple(token for token, _ in kept), tuple(count for _, count in kept))


# --- bytes --------------------------------------------------------------------------------------------------------


def encode(rows: Sequence[SparseRow], tokens: Sequence[int]) -> bytes:
    """A block's distributions as bytes; `tokens` were drawn from them and travel beside. No rows: all were certain.

    Rows have one total, a power of two from 2 to 256, but for those that are certain, whose total does not matter.
    `ValueError` when they have not, or when a token is not in its row.
    """
    open_rows = [row for row in rows if len(row.tokens) > 1]
    if not open_rows:
        return b""
    ell = open_rows[0].total
    bits = ell.bit_length() - 1
    if ell != 1 << bits or not 1 <= bits <= MOST_BITS or any(row.total != ell for row in open_rows):
        raise ValueError(f"the rows of a block share a total, a power of two up to {1 << MOST_BITS}")
    for row, token in zip(rows, tokens, strict=True):
        if token not in row.tokens:
            raise ValueError(f"token {token} was not drawn from its row")
    gaps = [_gaps(row, token) for row, token in zip(rows, tokens, strict=True)]
    flat = [gap for row_gaps in gaps for gap in row_gaps]
    rice = min(range(LARGEST_RICE + 1), key=lambda r: sum((gap >> r) + 1 + r for gap in flat))
    writer = _Writer()
    writer.put(bits, 4)
    writer.put(rice, 4)
    for row, row_gaps in zip(rows, gaps, strict=True):
        writer.put_gamma(len(row.tokens))
        for gap in row_gaps:
            writer.put_rice(gap, rice)
        if row_gaps:
            ways = math.comb(ell - 1, len(row_gaps))
            writer.put(_place(row.counts), (ways - 1).bit_length())
    return writer.bytes()


def decode(payload: bytes, tokens: Sequence[int], vocabulary: int) -> tuple[SparseRow, ...]:
    """The distributions that a block's `tokens` were drawn from; ids are below `vocabulary`.

    `ProtocolError` that says what is wrong when the bytes are not what `encode` makes for so many tokens.
    """
    if not payload:
        return tuple(SparseRow.certain(token) for token in tokens)
    reader = _Reader(payload)
    bits, rice = reader.take(4), reader.take(4)
    if not 1 <= bits <= MOST_BITS:
        raise ProtocolError(f"q: shares of {bits} bits; they have 1 to {MOST_BITS}")
    rows = tuple(_row(reader, token, 1 << bits, rice, vocabulary) for token in tokens)
    reader.end()
    return rows


def _gaps(row: SparseRow, drawn: int) -> list[int]:
    others = [token for token in row.tokens if token != drawn]
    return [token - before - 1 for before, token in pairwise([-1, *others])]


def _row(reader: _Reader, drawn: int, ell: int, rice: int, vocabulary: int) -> SparseRow:
    size = reader.take_gamma(ell)
    others: list[int] = []
    token = -1
    for _ in range(size - 1):
        token += 1 + reader.take_rice(rice, vocabulary)
        others.append(token)
    if token >= vocabulary or not 0 <= drawn < vocabulary:
        raise ProtocolError(f"q: token {max(token, drawn)}; the vocabulary is 0 to {vocabulary - 1}")
    if drawn in others:
        raise ProtocolError(f"q: the drawn token {drawn} is named twice in its row")
    ways = math.comb(ell - 1, size - 1)
    place = reader.take((ways - 1).bit_length())
    if place >= ways:
        raise ProtocolError(f"q: shares number {place} of {ways}")
    return SparseRow(tuple(sorted((*others, drawn))), _shares(place, size, ell))


def _place(counts: Sequence[int]) -> int:
    """The number of an ordered sum among all with as many positive terms: its partial sums are a combination, which the
    combinatorial number system numbers (Knuth, TAOCP 7.2.1.3)."""
    return sum(math.comb(end - 1, at) for at, end in enumerate(accumulate(counts[:-1]), start=1))


def _shares(place: int, size: int, ell: int) -> tuple[int, ...]:
    """The inverse of `_place`."""
    ends = [ell]
    for at in range(size - 1, 0, -1):
        end = bisect_right([math.comb(below, at) for below in range(ends[-1] - 1)], place)
        place -= math.comb(end - 1, at)
        ends.append(end)
    return tuple(end - before for before, end in pairwise([0, *reversed(ends)]))


class _Writer:
    def __init__(self) -> None:
        self._value, self._length = 0, 0

    def put(self, value: int, length: int) -> None:
        self._value = self._value << length | value
        self._length += length

    def put_gamma(self, value: int) -> None:
        self.put(value, 2 * value.bit_length() - 1)

    def put_rice(self, value: int, parameter: int) -> None:
        """The quotient in unary (ones, ended by a zero), then the remainder."""
        quotient = value >> parameter
        self.put(((1 << quotient) - 1) << 1, quotient + 1)
        self.put(value & ((1 << parameter) - 1), parameter)

    def bytes(self) -> bytes:
        empty = -self._length % 8
        return (self._value << empty).to_bytes((self._length + empty) // 8, "big")


class _Reader:
    def __init__(self, payload: bytes) -> None:
        self._bits, self._at = "".join(f"{byte:08b}" for byte in payload), 0

    def take(self, length: int) -> int:
        end = self._at + length
        if end > len(self._bits):
            raise ProtocolError("q: the bytes end within a row")
        taken, self._at = self._bits[self._at : end], end
        return int(taken or "0", 2)

    def take_gamma(self, most: int) -> int:
        first = self._bits.find("1", self._at)
        length = first - self._at + 1
        if first < 0 or length > most.bit_length():
            raise ProtocolError(f"q: the size of a row is not a number up to {most}")
        value = self.take(2 * length - 1)
        if value > most:
            raise ProtocolError(f"q: a row of {value} tokens, with shares for {most}")
        return value

    def take_rice(self, parameter: int, most: int) -> int:
        end = self._bits.find("0", self._at)
        quotient = end - self._at
        if end < 0 or quotient << parameter > most:
            raise ProtocolError(f"q: a gap beyond the vocabulary of {most}")
        self._at = end + 1
        return quotient << parameter | self.take(parameter)

    def end(self) -> None:
        left = self._bits[self._at :]
        if len(left) >= 8 or "1" in left:
            raise ProtocolError(f"q: {len(left)} bits are left over after the last row")
