"""Weights in the few bits that they were made of, exactly: what a pass of few rows on a CPU takes is the time to read the
weights, so a fifth of the bytes is a fifth of the time, and further rows cost little.

A float32 weight often says less than its 32 bits could: it was published in bfloat16, or is what a block-quantised file
(GGUF's Q4_1 and Q8_0) unpacks to. `compact` finds the coding out and keeps a matrix in it only if **every weight comes
back as it was** (a zero without its sign), so that the products are those of the float32 matrix, added up in another
order. It knows nothing of where the weights came from. `compact_kernels` multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

import torch
from torch import Tensor

from services.verifier.engine.vector_code import LANES

BLOCK: Final = 32
"""Columns of a row that share a scale."""
GROUPED: Final = 64
"""Kernels take up to four times `LANES` rows at once, so that is what a matrix's rows have to be a multiple of."""
_PART: Final = 4096
"""Rows that are looked at in one go, so that little memory is taken beside the matrix."""
_GLANCE: Final = 64


class Coding(Enum):
    """How weights are written down; its value is the bytes of codes for each block of each row."""

    NIBBLES = BLOCK // 2
    """scale · code + least, with codes 0 to 15 and a scale and a least value in float16 a block."""
    BYTES = BLOCK
    """scale · code, with codes -128 to 127 and a scale in float16 a block."""
    BFLOAT16 = 2 * BLOCK
    """The upper half of a float32; no scales."""


@dataclass(frozen=True, slots=True)
class CompactMatrix:
    """A matrix `[rows, columns]` in groups of `LANES` rows, of which a vector holds one value each.

    `codes` are uint8 by group, block, column (with NIBBLES column n of a block in the lower bits and n + 16 in the upper
    ones) and row; `scales` float16 by group, block and row, with NIBBLES those of a group's block before its least values.
    """

    coding: Coding
    rows: int
    columns: int
    codes: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return self.codes.nbytes + self.scales.nbytes


def compact(weight: Tensor) -> CompactMatrix | None:
    """`weight` [rows, columns] in the fewest bits that give it back exactly; None where there is no such coding, or its
    sizes are not multiples of `GROUPED` and `BLOCK`."""
    weight = weight.detach()
    if not can_be_compact(weight):
        return None
    for coding, code in _CODERS.items():
        if code(weight[:_GLANCE]) is None:
            continue
        parts = [code(weight[at : at + _PART]) for at in range(0, len(weight), _PART)]
        whole = [part for part in parts if part is not None]
        if len(whole) == len(parts):
            codes, scales = (torch.cat(each) for each in zip(*whole, strict=True))
            return CompactMatrix(coding, weight.shape[0], weight.shape[1], codes, scales)
    return None


def rounded(weight: Tensor) -> CompactMatrix:
    """`weight` in bytes, each the nearest to what it was; for matrices of which `can_be_compact` says so."""
    scale, codes = _nearest(_blocks(weight.detach()))
    return CompactMatrix(Coding.BYTES, weight.shape[0], weight.shape[1], *_bytes_of(scale, codes))


def can_be_compact(weight: Tensor) -> bool:
    """Whether there are kernels for a matrix of its sizes."""
    plain = weight.dim() == 2 and weight.dtype is torch.float32 and weight.device.type == "cpu"
    return plain and weight.numel() > 0 and not (weight.shape[0] % GROUPED or weight.shape[1] % BLOCK)


_Coded = tuple[Tensor, Tensor]


def _nibbles(weight: Tensor) -> _Coded | None:
    """Blocks of which all values are some of sixteen, evenly apart. Such a block holds its least value and, nearly always,
    the sixteenth; where it does not, fewer steps lie between its ends."""
    blocks = _blocks(weight)
    least, most = blocks.amin(dim=-1, keepdim=True), blocks.amax(dim=-1, keepdim=True)
    scale, found = torch.zeros_like(least), least == most
    codes = torch.zeros_like(blocks)
    for steps in range(15, 0, -1):
        if found.all():
            break
        guess = ((most - least) / steps).half().float()
        code = ((blocks - least) / guess.clamp(min=1e-30)).round().clamp(0, 15)
        exact = (_scaled(guess, code, least) == blocks).all(dim=-1, keepdim=True) & ~found
        scale, codes, found = guess.where(exact, scale), code.where(exact, codes), found | exact
    if not found.all() or not torch.equal(least.half().float(), least):
        return None
    lanes = _in_lanes(codes.to(torch.uint8))
    both = lanes[:, :, : BLOCK // 2] | lanes[:, :, BLOCK // 2 :] << 4
    return both.flatten(1), _in_lanes(torch.cat((scale, least), dim=-1).half()).flatten(1)


def _bytes(weight: Tensor) -> _Coded | None:
    """Blocks of which all values are whole multiples of the 127th part of the largest."""
    blocks = _blocks(weight)
    scale, codes = _nearest(blocks)
    if not torch.equal(scale * codes, blocks):
        return None
    return _bytes_of(scale, codes)


def _bytes_of(scale: Tensor, codes: Tensor) -> _Coded:
    return _in_lanes(codes.to(torch.int8)).flatten(1).view(torch.uint8), _in_lanes(scale.half()).flatten(1)


def _nearest(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and whole numbers of bytes."""
    scale = (blocks.abs().amax(dim=-1, keepdim=True) / 127).half().float()
    return scale, (blocks / scale.clamp(min=1e-30)).round().clamp(-128, 127)


def _bfloat16(weight: Tensor) -> _Coded | None:
    codes = weight.bfloat16()
    if not torch.equal(codes.float(), weight):
        return None
    lanes = _in_lanes(_blocks(codes.view(torch.int16)))
    return lanes.flatten(1).view(torch.uint8), torch.zeros(len(lanes), 0, dtype=torch.float16)


_CODERS: Final[dict[Coding, Callable[[Tensor], _Coded | None]]] = {
    Coding.NIBBLES: _nibbles,
    Coding.BYTES: _bytes,
    Coding.BFLOAT16: _bfloat16,
}


def _scaled(scale: Tensor, codes: Tensor, least: Tensor) -> Tensor:
    """scale · codes + least, rounded to float32 once, as a fused multiply-add does."""
    return (scale.double() * codes.double() + least.double()).float()


def _blocks(weight: Tensor) -> Tensor:
    """`[rows, blocks, BLOCK]`."""
    return weight.reshape(len(weight), -1, BLOCK)


def _in_lanes(blocks: Tensor) -> Tensor:
    """`[rows, blocks, n]` to `[groups, blocks, n, LANES]`."""
    groups = blocks.reshape(-1, LANES, *blocks.shape[1:])
    return groups.permute(0, 2, 3, 1).contiguous()


def decoded(matrix: CompactMatrix) -> Tensor:
    """The float32 matrix."""
    groups, blocks = matrix.rows // LANES, matrix.columns // BLOCK
    codes = matrix.codes.reshape(groups, blocks, -1)
    if matrix.coding is Coding.NIBBLES:
        halves = codes.view(groups, blocks, BLOCK // 2, LANES)
        values = torch.cat((halves & 15, halves >> 4), dim=2).float()
        both = matrix.scales.view(groups, blocks, 2, LANES).float()
        lanes = _scaled(both[:, :, :1], values, both[:, :, 1:])
    elif matrix.coding is Coding.BYTES:
        values = codes.view(torch.int8).view(groups, blocks, BLOCK, LANES).float()
        lanes = values * matrix.scales.view(groups, blocks, 1, LANES).float()
    else:
        lanes = codes.view(torch.bfloat16).view(groups, blocks, BLOCK, LANES).float()
    return lanes.permute(0, 3, 1, 2).reshape(matrix.rows, matrix.columns)


def share_of(matrices: Sequence[CompactMatrix]) -> float:
    """The bytes of these as a share of what they take in float32."""
    return sum(each.nbytes for each in matrices) / sum(4 * each.rows * each.columns for each in matrices)
