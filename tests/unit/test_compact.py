"""Weights in few bits: every one comes back, and products are those of the float32 matrix."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.verifier.engine.compact import BLOCK, Coding, CompactMatrix, compact, decoded, share_of
from services.verifier.engine.compact_kernels import MOST_ROWS, CompactProduct


def q4_1(rows: int, columns: int, seed: int = 0) -> Tensor:
    """What a GGUF's Q4_1 unpacks to: blocks of 32 with a scale and a least value in float16, sixteen levels."""
    random = torch.Generator().manual_seed(seed)
    blocks = torch.randn(rows, columns // BLOCK, BLOCK, generator=random) * torch.rand(
        rows, 1, 1, generator=random
    )
    least = blocks.amin(dim=-1, keepdim=True)
    scale = (blocks.amax(dim=-1, keepdim=True) - least) / 15
    codes = ((blocks - least) / scale.clamp(min=1e-12)).round().clamp(0, 15)
    return (scale.half().float() * codes + least.half().float()).reshape(rows, columns)


def q8_0(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Blocks of 32 with a scale in float16 and whole multiples of it."""
    random = torch.Generator().manual_seed(seed)
    blocks = torch.randn(rows, columns // BLOCK, BLOCK, generator=random)
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
    return (scale.half().float() * (blocks / scale).round()).reshape(rows, columns)


def bfloat16(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


MADE = {Coding.NIBBLES: q4_1, Coding.BYTES: q8_0, Coding.BFLOAT16: bfloat16}
every_coding = pytest.mark.parametrize(
    ("coding", "made"), MADE.items(), ids=lambda value: getattr(value, "name", "")
)


def held(weight: Tensor) -> CompactMatrix:
    found = compact(weight)
    assert found is not None
    return found


@every_coding
def test_every_weight_comes_back_exactly(coding: Coding, made: Callable[[int, int], Tensor]) -> None:
    weight = made(192, 96)
    matrix = held(weight)
    assert matrix.coding is coding
    assert torch.equal(decoded(matrix), weight)


def test_the_share_of_the_bytes_is_that_of_the_coding() -> None:
    assert share_of([held(q4_1(64, 64))]) == pytest.approx((0.5 + 4 / 32) / 4)
    assert share_of([held(q8_0(64, 64))]) == pytest.approx((1 + 2 / 32) / 4)
    assert share_of([held(bfloat16(64, 64))]) == pytest.approx(0.5)


@every_coding
def test_one_weight_that_the_coding_cannot_say_leaves_the_matrix_as_it_is(
    coding: Coding, made: Callable[[int, int], Tensor]
) -> None:
    for row in (0, 150):
        weight = made(192, 96)
        weight[row, 40] += 1e-5
        assert compact(weight) is None


def test_blocks_that_do_not_reach_all_sixteen_levels_come_back() -> None:
    weight = torch.tensor([0.0, 0.25, 0.5, 0.75]).repeat(64, 8)
    weight[3] = 0.125  # a block of one value
    assert torch.equal(decoded(held(weight)), weight)


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(64, 64),
        bfloat16(65, 64),
        bfloat16(64, 48),
        bfloat16(64, 64).bfloat16(),
        bfloat16(64, 64)[0],
        torch.zeros(0, 64),
    ],
    ids=["other values", "odd rows", "odd columns", "another type", "a vector", "nothing"],
)
def test_what_has_no_coding_is_left(weight: Tensor) -> None:
    assert compact(weight) is None


@every_coding
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, MOST_ROWS])
def test_products_are_those_of_the_matrix(
    coding: Coding, made: Callable[[int, int], Tensor], rows: int
) -> None:
    weight = made(192, 160)
    values = torch.randn(rows, 160, generator=torch.Generator().manual_seed(rows))
    product = CompactProduct(held(weight))(values)
    exact = values.double() @ weight.double().T
    bound = 1e-6 * (values.abs().double() @ weight.abs().double().T)
    assert product.shape == (rows, 192)
    assert ((product.double() - exact).abs() <= bound).all()


@every_coding
def test_a_row_gives_the_same_bits_alone_and_among_others(
    coding: Coding, made: Callable[[int, int], Tensor]
) -> None:
    product = CompactProduct(held(made(128, 96)))
    values = torch.randn(11, 96)
    together = product(values)
    alone = torch.cat([product(row[None]) for row in values])
    assert torch.equal(together, alone)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 3), columns=st.integers(1, 4))
def test_whatever_the_weights_are_none_is_lost(seed: int, rows: int, columns: int) -> None:
    for made in MADE.values():
        weight = made(64 * rows, BLOCK * columns, seed)
        matrix = compact(weight)
        assert matrix is None or torch.equal(decoded(matrix), weight)


def test_values_of_any_shape_keep_it() -> None:
    product = CompactProduct(held(q8_0(64, 32)))
    values = torch.randn(2, 3, 32)
    assert torch.equal(product(values), product(values.view(6, 32)).view(2, 3, 64))
    assert product(values[:, ::2]).shape == (2, 2, 64)
    assert torch.equal(product(values[:, ::2]), product(values)[:, ::2])
