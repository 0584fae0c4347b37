"""An int8 matrix must stay near the one that it stands for, whatever comes in."""

from __future__ import annotations

import pytest
import torch

from services.verifier.engine.int8 import Int8Matrix, QuickMatrix, has_int8


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    found = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    if not has_int8(found):
        pytest.skip("no int8 kernel here")
    return found


def test_a_product_is_near_the_exact_one(weight: torch.Tensor) -> None:
    values = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    exact = values @ weight.T
    assert (Int8Matrix(weight)(values) - exact).norm() < 0.02 * exact.norm()


def test_the_sums_of_the_largest_values_do_not_overflow() -> None:
    weight = torch.full((32, 64), 3.0)
    if not has_int8(weight):
        pytest.skip("no int8 kernel here")
    values = torch.full((2, 64), 5.0)
    assert torch.allclose(Int8Matrix(weight)(values), values @ weight.T, rtol=0.01)


def test_a_large_row_takes_nothing_from_a_small_one_where_each_stands_alone(weight: torch.Tensor) -> None:
    values = torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    values[1] *= 1000.0
    exact = values @ weight.T

    def missed(alone: bool) -> float:
        found = Int8Matrix(weight, alone=alone)(values)
        return float((found - exact)[0].norm() / exact[0].norm())

    assert missed(alone=True) < 0.02
    assert missed(alone=False) > 0.5
    assert torch.equal(Int8Matrix(weight, alone=True)(torch.zeros(1, 64)), torch.zeros(1, 96))


@pytest.mark.parametrize("rows", [1, 8, 9, 40])
@pytest.mark.parametrize("shape", [(128, 64), (96, 64)], ids=["with kernels for few rows", "without"])
def test_few_rows_and_many_are_near_the_exact_product(rows: int, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if not has_int8(weight):
        pytest.skip("no int8 kernel here")
    values = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows))
    exact = values @ weight.T
    found = QuickMatrix(weight, alone=True)(values)
    assert found.shape == exact.shape
    assert (found - exact).norm() < 0.02 * exact.norm()
