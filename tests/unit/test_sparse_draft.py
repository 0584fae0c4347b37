"""Distributions that travel: the lattice point is the nearest one, bytes say the same, bad bytes say what is wrong."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ProtocolError
from shared.sampling.sparse import (
    SparseRow,
    above,
    decode,
    dropped_mass,
    encode,
    quantised,
    top,
)

VOCABULARY = 49152
BITS = st.integers(1, 8)


@st.composite
def candidates(draw: st.DrawFn) -> list[tuple[int, float]]:
    """A few tokens and their probabilities, likeliest first, not summing to one."""
    tokens = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40, unique=True))
    weights = draw(st.lists(st.floats(1e-6, 1.0), min_size=len(tokens), max_size=len(tokens)))
    scale = draw(st.floats(0.01, 1.0)) / sum(weights)
    found = [(token, weight * scale) for token, weight in zip(tokens, weights, strict=True)]
    return sorted(found, key=lambda each: -each[1])


@st.composite
def blocks(draw: st.DrawFn) -> tuple[tuple[SparseRow, ...], tuple[int, ...]]:
    """Rows of one total, and a token of each."""
    bits = draw(BITS)
    rows = tuple(quantised(each, bits) for each in draw(st.lists(candidates(), max_size=6)))
    return rows, tuple(draw(st.sampled_from(row.tokens)) for row in rows)


# --- rounding -----------------------------------------------------------------------------------------------------


@given(candidates(), BITS)
def test_shares_are_whole_and_sum_to_the_total(found: list[tuple[int, float]], bits: int) -> None:
    row = quantised(found, bits)
    assert sum(row.counts) == 1 << bits
    assert min(row.counts) >= 1
    assert list(row.tokens) == sorted(set(row.tokens))
    assert set(row.tokens) <= {token for token, _ in found}


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=4),
    st.integers(1, 3),
)
def test_no_other_lattice_point_is_nearer(weights: list[int], bits: int) -> None:
    ell = 1 << bits
    found = [(token, weight / sum(weights)) for token, weight in enumerate(weights)]

    def distance(shares: tuple[int, ...]) -> float:
        return sum((share - ell * p) ** 2 for share, (_, p) in zip(shares, found, strict=True))

    row = quantised(found, bits)
    shares = tuple(round(row.probability(token) * ell) for token, _ in found)
    every = (point for point in itertools.product(range(ell + 1), repeat=len(found)) if sum(point) == ell)
    assert distance(shares) <= min(map(distance, every)) + 1e-9


@given(candidates(), BITS)
def test_the_order_of_candidates_does_not_matter(found: list[tuple[int, float]], bits: int) -> None:
    assert quantised(found, bits) == quantised(found[::-1], bits)


@pytest.mark.parametrize("found", [[], [(1, 0.0)], [(1, 1.5), (2, -0.5)]])
def test_what_is_no_distribution_is_refused(found: list[tuple[int, float]]) -> None:
    with pytest.raises(ValueError, match="probabilities"):
        quantised(found, 4)


def test_shares_of_too_many_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 8 bits"):
        quantised([(1, 1.0)], 9)


def test_numbers_between_0_and_1_draw_each_token_by_its_share() -> None:
    row = SparseRow((3, 8, 9), (1, 5, 2))
    drawn = Counter(row.draw((n + 0.5) / 800) for n in range(800))
    assert drawn == {3: 100, 8: 500, 9: 200}


# --- truncation ---------------------------------------------------------------------------------------------------

LIKELIEST = [(7, 0.5), (2, 0.25), (9, 0.125), (1, 0.0625)]


def test_top_keeps_the_likeliest() -> None:
    assert top(LIKELIEST, 2) == LIKELIEST[:2]
    assert dropped_mass(top(LIKELIEST, 2)) == pytest.approx(0.25)


def test_a_threshold_keeps_what_reaches_it_and_one_token_in_any_case() -> None:
    assert above(LIKELIEST, 0.125) == LIKELIEST[:3]
    assert above(LIKELIEST, 0.9) == LIKELIEST[:1]
    assert above(LIKELIEST, -0.01) == LIKELIEST


# --- bytes --------------------------------------------------------------------------------------------------------


@given(blocks())
def test_bytes_say_the_same(block: tuple[tuple[SparseRow, ...], tuple[int, ...]]) -> None:
    rows, tokens = block
    read = decode(encode(rows, tokens), tokens, VOCABULARY)
    for row, other in zip(rows, read, strict=True):
        assert row.tokens == other.tokens
        assert row.counts == other.counts or len(row.tokens) == 1


@given(st.integers(2, 5), st.integers(5, 9))
def test_every_way_to_share_has_a_number_of_its_own(size: int, ell_less: int) -> None:
    shares = [counts for counts in itertools.product(range(1, 9), repeat=size) if sum(counts) == 8]
    rows = [SparseRow(tuple(range(size)), counts) for counts in shares]
    written = {encode([row], [0]) for row in rows}
    assert len(written) == len(rows) == math.comb(7, size - 1)


def test_certain_tokens_take_no_bytes() -> None:
    rows = (SparseRow.certain(5), SparseRow.certain(VOCABULARY - 1, 64))
    tokens = (5, VOCABULARY - 1)
    assert encode(rows, tokens) == b""
    assert [
        row.probability(token) for row, token in zip(decode(b"", tokens, VOCABULARY), tokens, strict=True)
    ] == [1, 1]


def test_a_row_of_eight_tokens_takes_less_than_two_bytes_a_token() -> None:
    rows = [quantised([(token, 0.5**n) for n, token in enumerate(range(1000, 48000, 6000), 1)], 6)] * 5
    assert len(encode(rows, [1000] * 5)) < 5 * 16


def test_a_token_that_is_not_in_its_row_is_not_written() -> None:
    with pytest.raises(ValueError, match="token 4 was not drawn"):
        encode([SparseRow((1, 2), (3, 5))], [4])


def test_rows_of_different_totals_are_not_written() -> None:
    with pytest.raises(ValueError, match="share a total"):
        encode([SparseRow((1, 2), (3, 5)), SparseRow((1, 2), (3, 1))], [1, 1])


@given(blocks(), st.data())
def test_bytes_cut_short_are_refused(
    block: tuple[tuple[SparseRow, ...], tuple[int, ...]], data: st.DataObject
) -> None:
    rows, tokens = block
    payload = encode(rows, tokens)
    if len(payload) > 1:
        with pytest.raises(ProtocolError, match=r"^q: "):
            decode(payload[: data.draw(st.integers(1, len(payload) - 1))], tokens, VOCABULARY)


@given(blocks())
def test_bytes_left_over_are_refused(block: tuple[tuple[SparseRow, ...], tuple[int, ...]]) -> None:
    rows, tokens = block
    payload = encode(rows, tokens)
    if payload:
        with pytest.raises(ProtocolError, match="left over"):
            decode(payload + b"\0", tokens, VOCABULARY)


@given(st.binary(min_size=1, max_size=60), st.lists(st.integers(0, 299), max_size=5))
def test_any_bytes_are_a_block_or_refused(payload: bytes, tokens: list[int]) -> None:
    try:
        rows = decode(payload, tokens, 300)
    except ProtocolError as error:
        assert error.message.startswith("q: ")
        return
    for row, token in zip(rows, tokens, strict=True):
        assert row.probability(token) > 0
        assert all(0 <= each < 300 for each in row.tokens)
        assert min(row.counts) >= 1


@pytest.mark.parametrize(
    ("bits", "tokens", "wrong"),
    [
        ("00000000", [1], "shares of 0 bits"),
        ("10010000", [1], "shares of 9 bits"),
        ("00010000" "00100000", [1], "size of a row"),
        ("00010000" "011" + "0" * 5, [1], "a row of 3 tokens, with shares for 2"),
        ("00011111" "010" "0" + "1" * 15 + "0" * 5, [1], "the vocabulary is 0 to 299"),
        ("00010000" "010" + "1" * 301 + "0" * 8, [1], "a gap beyond the vocabulary of 300"),
        ("00010000" "010" "10" "000", [1], "drawn token 1 is named twice"),
        ("00100000" "011" "0" "0" "11" "0", [2], "shares number 3 of 3"),
        ("00010000" "010" "10" "001", [2], "left over"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(bits: str, tokens: list[int], wrong: str) -> None:
    payload = int(bits, 2).to_bytes(len(bits) // 8, "big") if len(bits) % 8 == 0 else b""
    payload = payload or int(bits + "0" * (-len(bits) % 8), 2).to_bytes(-(-len(bits) // 8), "big")
    with pytest.raises(ProtocolError, match=wrong):
        decode(payload, tokens, 300)
