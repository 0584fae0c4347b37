"""Has vLLM's linear layers multiply with compact weights where few rows are computed.

vLLM gives each linear layer on a CPU, once its weights are loaded, a function that multiplies. Within `compacting` that
function is wrapped: few rows go through `compact_kernels`, many through what vLLM chose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final
from unittest import mock

from torch import Tensor
from vllm.model_executor.layers import utils

from services.verifier.engine.compact import CompactMatrix, compact
from services.verifier.engine.compact_kernels import MOST_ROWS, CompactProduct

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
_DISPATCH: Final = "dispatch_cpu_unquantized_gemm"


class CompactLinear:
    """What a layer multiplies with: (values, weight, bias) as vLLM calls it, the weight left aside for few rows."""

    def __init__(self, matrix: CompactMatrix, otherwise: Linear) -> None:
        self._product, self._otherwise = CompactProduct(matrix), otherwise
        self._columns = matrix.columns

    def __call__(self, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """values @ weight.T + bias."""
        if values.numel() > MOST_ROWS * self._columns:
            return self._otherwise(values, weight, bias)
        product = self._product(values)
        return product if bias is None else product + bias


@contextmanager
def compacting(wanted: bool) -> Iterator[list[CompactMatrix]]:
    """Models that are loaded meanwhile multiply with compact weights, where `wanted`; yields those that are found."""
    found: list[CompactMatrix] = []
    if not wanted:
        yield found
        return
    vllms_own = getattr(utils, _DISPATCH)

    def dispatch(layer: Any, remove_weight: bool) -> None:
        matrix = compact(layer.weight)
        vllms_own(layer, remove_weight)
        if matrix is not None:
            found.append(matrix)
            layer.cpu_linear = CompactLinear(matrix, layer.cpu_linear)

    with mock.patch.object(utils, _DISPATCH, dispatch):
        yield found
