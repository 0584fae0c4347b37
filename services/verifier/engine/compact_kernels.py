"""Products with `CompactMatrix` where few rows of values are multiplied.

A kernel is made for a coding and a number of rows of values. It goes through the matrix once, `LANES` rows of it in a
vector; each weight is put together in a register, as exactly the float32 that it stands for, and multiplied with every row
of values. So the bytes that are read and the work of unpacking are the same for one row of values and for eight, and a row
gives the same products, to the bit, alone and among others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Final

import torch
from llvmlite import ir
from torch import Tensor

from services.verifier.engine.compact import BLOCK, Coding, CompactMatrix
from services.verifier.engine.vector_code import (
    BYTE,
    FLOAT,
    HALF,
    INT,
    LANES,
    LONG,
    SHORT,
    VECTOR,
    Kernel,
    constant,
    vector,
)

MOST_AT_ONCE: Final = 8
"""Rows of values of one kernel: two vectors of sums for each, with what else is needed, fill the registers of AVX-512."""
MOST_ROWS: Final = 24
"""More are left to the matrix product that was there before. Eight at a time took .25 to .65 of its time for 1 to 16 rows
here, as long for 32."""
_UNROLLED: Final = 8


class CompactProduct:
    """values [rows, columns] @ matrix.T, float32, on the thread that calls."""

    def __init__(self, matrix: CompactMatrix) -> None:
        self.matrix = matrix
        self._codes, self._scales = matrix.codes.data_ptr(), matrix.scales.data_ptr()
        self._kernels = [product(matrix.coding, rows + 1) for rows in range(MOST_AT_ONCE)]
        self._sizes = matrix.rows, matrix.columns // BLOCK

    def __call__(self, values: Tensor) -> Tensor:
        """`values` [..., columns] to [..., matrix rows]."""
        values = values.contiguous()
        found = torch.empty((*values.shape[:-1], self.matrix.rows))
        self.into(found.data_ptr(), values.data_ptr(), values.numel() // self.matrix.columns)
        return found

    def into(self, products: int, values: int, rows: int) -> None:
        """The same for `rows` rows that lie behind each other, by addresses."""
        while rows > 0:
            taken = min(rows, MOST_AT_ONCE)
            self._kernels[taken - 1](self._codes, self._scales, values, products, *self._sizes)
            values += 4 * taken * self.matrix.columns
            products += 4 * taken * self.matrix.rows
            rows -= taken


@cache
def product(coding: Coding, rows: int) -> Callable[..., None]:
    """The kernel for `rows` rows of values: (codes, scales, values, products: addresses; matrix rows, blocks a row)."""
    return _Product(coding, rows).compiled()


class _Product(Kernel):
    def __init__(self, coding: Coding, rows: int) -> None:
        bytes_at, floats_at = BYTE.as_pointer(), FLOAT.as_pointer()
        super().__init__([bytes_at, bytes_at, floats_at, floats_at, LONG, LONG])
        self._coding, self._groups = coding, 4 if rows <= 2 else 2
        self._codes, self._scales, self._values, products, height, self._blocks = self.arguments
        build = self.build
        sums = [[build.alloca(VECTOR) for _ in range(rows)] for _ in range(self._groups)]
        self._columns = build.mul(self._blocks, LONG(BLOCK))
        with self.loop(build.udiv(height, LONG(LANES)), self._groups) as group:
            for each in sums:
                for one in each:
                    build.store(constant(0.0), one)
            with self.loop(self._blocks) as block:
                self._block(group, block, sums)
            for beside, each in enumerate(sums):
                first = build.mul(build.add(group, LONG(beside)), LONG(LANES))
                for row, one in enumerate(each):
                    self.store(build.load(one), products, build.add(build.mul(height, LONG(row)), first))

    def _block(self, group: ir.Value, block: ir.Value, sums: list[list[ir.Value]]) -> None:
        """A block of the rows of a few groups, times the same columns of all rows of values."""
        build = self.build
        places = [
            build.add(build.mul(build.add(group, LONG(beside)), self._blocks), block)
            for beside in range(self._groups)
        ]
        scales = [self._scales_at(place) for place in places]
        steps = BLOCK // 2 if self._coding is Coding.NIBBLES else BLOCK
        size = LANES * self._coding.value
        element = SHORT if self._coding is Coding.BFLOAT16 else BYTE
        first = build.mul(block, LONG(BLOCK))
        with self.loop(LONG(steps), _UNROLLED) as begin:
            for further in range(_UNROLLED):
                step = build.add(begin, LONG(further))
                within = build.mul(step, LONG(size // steps))
                for place, scale, each in zip(places, scales, sums, strict=True):
                    codes = self.load(self._codes, build.add(build.mul(place, LONG(size)), within), element)
                    for column, weights in self._weights(codes, scale, step):
                        self._add(weights, build.add(first, column), each)

    def _scales_at(self, place: ir.Value) -> list[ir.Value]:
        """What a block of `LANES` rows has beside its codes, float32."""
        build = self.build
        parts = {Coding.NIBBLES: 2, Coding.BYTES: 1, Coding.BFLOAT16: 0}[self._coding]
        size = 2 * LANES
        first = build.mul(place, LONG(parts * size))
        return [
            build.fpext(self.load(self._scales, build.add(first, LONG(part * size)), HALF), VECTOR)
            for part in range(parts)
        ]

    def _weights(
        self, codes: ir.Value, scale: list[ir.Value], step: ir.Value
    ) -> Iterator[tuple[ir.Value, ir.Value]]:
        """Columns of a block, and what `LANES` rows have there."""
        build, wide = self.build, vector(INT)
        if self._coding is Coding.NIBBLES:
            low, high = build.and_(codes, constant(15, BYTE)), build.lshr(codes, constant(4, BYTE))
            for column, half in ((step, low), (build.add(step, LONG(BLOCK // 2)), high)):
                values = build.sitofp(build.zext(half, wide), VECTOR)
                yield column, self.call("fma", scale[0], values, scale[1])
        elif self._coding is Coding.BYTES:
            yield step, build.fmul(scale[0], build.sitofp(build.sext(codes, wide), VECTOR))
        else:
            yield step, build.bitcast(build.shl(build.zext(codes, wide), constant(16, INT)), VECTOR)

    def _add(self, weights: ir.Value, column: ir.Value, sums: list[ir.Value]) -> None:
        """Multiply with each row's value in that column."""
        build = self.build
        for row, one in enumerate(sums):
            at = build.add(build.mul(self._columns, LONG(row)), column)
            value = self.spread(build.load(build.gep(self._values, [at])))
            build.store(self.call("fma", weights, value, build.load(one)), one)
