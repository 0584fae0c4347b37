"""Matrices of int8 values for CPUs: a quarter of the memory to read, which is what a few rows of activations cost.

Kernels without VNNI add pairs of products in 16 bits. Seven bits a weight leave room there for all eight bits of what
comes in, which is where precision is lost: few values of a hidden state are large, most are small.
"""

from __future__ import annotations

import warnings
from typing import Final

import torch
from torch import Tensor

from services.verifier.engine.compact import can_be_compact, rounded
from services.verifier.engine.compact_kernels import MOST_AT_ONCE, CompactProduct

ENGINE: Final = "onednn"
LARGEST: Final = 63


class Int8Matrix:
    """A matrix as small integers with one scale a row, symmetric; what comes in is quantised as it comes."""

    def __init__(self, weight: Tensor, *, alone: bool = False) -> None:
        """`weight` is [out, in], float32. `alone`: rows of values that differ in size keep a scale each, for a pass over
        what comes out."""
        self._alone = alone
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = ENGINE
        scales = weight.abs().amax(dim=1).clamp(min=1e-8) / LARGEST
        zeros = torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
            rows = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self._packed = torch.ops.quantized.linear_prepack(rows, None)
        torch.backends.quantized.engine = before

    def __call__(self, values: Tensor) -> Tensor:
        """`values @ weight.T`, roughly."""
        if not self._alone:
            return self._product(values)
        sizes = values.abs().amax(dim=-1, keepdim=True).clamp(min=1e-8)
        return self._product(values / sizes).mul_(sizes)

    def _product(self, values: Tensor) -> Tensor:
        product: Tensor = torch.ops.quantized.linear_dynamic(values, self._packed, False)
        return product


class QuickMatrix:
    """`Int8Matrix`, and for a few rows kernels that leave the rows as they are and take half the time."""

    def __init__(self, weight: Tensor, *, alone: bool = False) -> None:
        """As for `Int8Matrix`."""
        self._many = Int8Matrix(weight, alone=alone)
        self._few = CompactProduct(rounded(weight)) if can_be_compact(weight) else None
        self._most = MOST_AT_ONCE * weight.shape[1]

    def __call__(self, values: Tensor) -> Tensor:
        """`values @ weight.T`, roughly."""
        if self._few is None or values.numel() > self._most:
            return self._many(values)
        return self._few(values)


def has_int8(weight: Tensor) -> bool:
    """Whether `Int8Matrix` takes this matrix: float32, on a CPU for which this torch has the kernels."""
    plain = weight.device.type == "cpu" and weight.dtype is torch.float32
    return plain and ENGINE in torch.backends.quantized.supported_engines
