"""Matrices of int8 values for CPUs: a quarter of the memory to read, which is what a few rows of activations cost."""

from __future__ import annotations

import warnings
from typing import Final

import torch
from torch import Tensor

ENGINE: Final = "onednn"


class Int8Matrix:
    """A matrix as int8 values with one scale a row, symmetric; what comes in is quantised as it comes."""

    def __init__(self, weight: Tensor) -> None:
        """`weight` is [out, in], float32."""
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = ENGINE
        scales = weight.abs().amax(dim=1).clamp(min=1e-8) / 127
        zeros = torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
            rows = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self._packed = torch.ops.quantized.linear_prepack(rows, None)
        torch.backends.quantized.engine = before

    def __call__(self, values: Tensor) -> Tensor:
        """`values @ weight.T`, roughly."""
        product: Tensor = torch.ops.quantized.linear_dynamic(values, self._packed, True)
        return product


def has_int8(weight: Tensor) -> bool:
    """Whether `Int8Matrix` takes this matrix: float32, on a CPU for which this torch has the kernels."""
    plain = weight.device.type == "cpu" and weight.dtype is torch.float32
    return plain and ENGINE in torch.backends.quantized.supported_engines
