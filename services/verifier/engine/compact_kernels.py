"""Products with `CompactMatrix`, compiled for the processor at hand by LLVM (llvmlite, which vLLM brings with it).

A kernel is made for a coding and a number of rows of values. It goes through the matrix once, sixteen rows of it in a
vector; each weight is put together in a register, as exactly the float32 that it stands for, and multiplied with every row
of values. So the bytes that are read and the work of unpacking are the same for one row of values and for eight.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Final

import torch
from llvmlite import binding, ir
from llvmlite.binding import ffi
from torch import Tensor

from services.verifier.engine.compact import BLOCK, LANES, Coding, CompactMatrix

MOST_AT_ONCE: Final = 8
"""Rows of values of one kernel: two vectors of sums for each, with what else is needed, fill the registers of AVX-512."""
MOST_ROWS: Final = 24
"""More are left to the matrix product that was there before. Eight at a time took .25 to .65 of its time for 1 to 16 rows
here, as long for 32."""
_UNROLLED: Final = 4

# llvmlite's handle of its library takes any attribute for a function of it, `__dict__` too. vLLM looks into the `__dict__`
# of every module's values when it makes a worker, and finds no mapping.
ffi.lib._fntab.setdefault("__dict__", {})

_FLOAT: Final = ir.FloatType()
_INT: Final = ir.IntType(64)
_BYTE: Final = ir.IntType(8)


def _vector(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, LANES)


class CompactProduct:
    """values [rows, columns] @ matrix.T for at most `MOST_ROWS` rows of values, float32, on the thread that calls."""

    def __init__(self, matrix: CompactMatrix) -> None:
        self._matrix = matrix
        self._codes, self._scales = matrix.codes.data_ptr(), matrix.scales.data_ptr()
        self._kernels = [kernel(matrix.coding, rows + 1) for rows in range(MOST_AT_ONCE)]
        self._sizes = matrix.rows, matrix.columns // BLOCK

    def __call__(self, values: Tensor) -> Tensor:
        """`values` [..., columns] to [..., matrix rows]."""
        rows, columns = self._matrix.rows, self._matrix.columns
        values = values.contiguous()
        found = torch.empty((*values.shape[:-1], rows))
        given, out, left = values.data_ptr(), found.data_ptr(), values.numel() // columns
        while left > 0:
            taken = min(left, MOST_AT_ONCE)
            self._kernels[taken - 1](self._codes, self._scales, given, out, *self._sizes)
            given, out, left = given + 4 * taken * columns, out + 4 * taken * rows, left - taken
        return found


@cache
def kernel(coding: Coding, rows: int) -> Callable[..., None]:
    """The kernel for `rows` rows of values: (codes, scales, values, products: addresses; matrix rows, blocks a row)."""
    machine = _machine()
    module = binding.parse_assembly(str(_module(coding, rows)))
    tuning = binding.create_pipeline_tuning_options(speed_level=3)
    tuning.slp_vectorization = False
    builder = binding.create_pass_builder(machine, tuning)
    builder.getModulePassManager().run(module, builder)
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _ENGINES.append(engine)
    signature = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 2)
    function: Callable[..., None] = signature(engine.get_function_address("product"))
    return function


_ENGINES: Final[list[Any]] = []
"""They own the kernels' memory."""


def _machine() -> Any:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    found = binding.get_host_cpu_features()
    features = [found.flatten(), *(["-prefer-256-bit"] if found.get("avx512f") else [])]
    return binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=",".join(features), opt=3, jit=True
    )


def _module(coding: Coding, rows: int) -> ir.Module:
    module = ir.Module()
    module.triple = binding.get_process_triple()
    pointers = [_BYTE.as_pointer(), _BYTE.as_pointer(), _FLOAT.as_pointer(), _FLOAT.as_pointer()]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [*pointers, _INT, _INT]), "product")
    for argument in function.args[:4]:
        argument.add_attribute("noalias")
    _Kernel(function, coding, rows).build()
    return module


class _Kernel:
    """Writes one kernel down."""

    def __init__(self, function: ir.Function, coding: Coding, rows: int) -> None:
        self._function, self._coding, self._rows = function, coding, rows
        self._groups = 4 if rows <= 2 else 2
        self._builder = ir.IRBuilder(function.append_basic_block("entry"))
        self._codes, self._scales, self._values, self._products, self._height, self._blocks = function.args
        vector = _vector(_FLOAT)
        self._fma = ir.Function(function.module, ir.FunctionType(vector, [vector] * 3), "llvm.fma.v16f32")

    def build(self) -> None:
        """For each few groups of matrix rows: sums of zero, all blocks, and out."""
        build = self._builder
        sums = [[build.alloca(_vector(_FLOAT)) for _ in range(self._rows)] for _ in range(self._groups)]
        zero = ir.Constant(_vector(_FLOAT), [0.0] * LANES)
        columns = build.mul(self._blocks, _INT(BLOCK))
        with self._loop(build.udiv(self._height, _INT(LANES)), self._groups) as group:
            for each in sums:
                for one in each:
                    build.store(zero, one)
            with self._loop(self._blocks, 1) as block:
                self._block(group, block, columns, sums)
            for beside, each in enumerate(sums):
                first = build.mul(build.add(group, _INT(beside)), _INT(LANES))
                for row, one in enumerate(each):
                    at = build.gep(self._products, [build.add(build.mul(self._height, _INT(row)), first)])
                    build.store(build.load(one), build.bitcast(at, _vector(_FLOAT).as_pointer()), align=4)
        build.ret_void()

    def _block(self, group: ir.Value, block: ir.Value, columns: ir.Value, sums: list[list[ir.Value]]) -> None:
        build = self._builder
        places = [
            build.add(build.mul(build.add(group, _INT(beside)), self._blocks), block)
            for beside in range(self._groups)
        ]
        halves = {Coding.NIBBLES: 2, Coding.BYTES: 1, Coding.BFLOAT16: 0}[self._coding]
        scales = [
            [
                build.fpext(
                    self._load(self._scales, place, 2 * LANES * halves, 2 * LANES * half, ir.HalfType()),
                    _vector(_FLOAT),
                )
                for half in range(halves)
            ]
            for place in places
        ]
        steps = BLOCK // 2 if self._coding is Coding.NIBBLES else BLOCK
        wide = LANES * self._coding.value // steps
        first = build.mul(block, _INT(BLOCK))
        with self._loop(_INT(steps), _UNROLLED) as begin:
            for further in range(_UNROLLED):
                step = build.add(begin, _INT(further))
                for place, scale, each in zip(places, scales, sums, strict=True):
                    codes = self._load(
                        self._codes,
                        place,
                        LANES * self._coding.value,
                        build.mul(step, _INT(wide)),
                        ir.IntType(8 * wide // LANES),
                    )
                    for column, weights in self._weights(codes, scale, step):
                        self._add(weights, build.add(first, column), columns, each)

    def _weights(
        self, codes: ir.Value, scale: list[ir.Value], step: ir.Value
    ) -> Iterator[tuple[ir.Value, ir.Value]]:
        """Columns of a block, and what `LANES` rows have there."""
        build, wide = self._builder, _vector(ir.IntType(32))
        if self._coding is Coding.NIBBLES:
            low = build.and_(codes, ir.Constant(_vector(_BYTE), [15] * LANES))
            high = build.lshr(codes, ir.Constant(_vector(_BYTE), [4] * LANES))
            for column, half in ((step, low), (build.add(step, _INT(BLOCK // 2)), high)):
                values = build.sitofp(build.zext(half, wide), _vector(_FLOAT))
                yield column, build.call(self._fma, [scale[0], values, scale[1]])
        elif self._coding is Coding.BYTES:
            yield step, build.fmul(scale[0], build.sitofp(build.sext(codes, wide), _vector(_FLOAT)))
        else:
            upper = build.shl(build.zext(codes, wide), ir.Constant(wide, [16] * LANES))
            yield step, build.bitcast(upper, _vector(_FLOAT))

    def _add(self, weights: ir.Value, column: ir.Value, columns: ir.Value, sums: list[ir.Value]) -> None:
        """Multiply with each row's value in that column."""
        build, undefined = self._builder, ir.Constant(_vector(_FLOAT), ir.Undefined)
        same = ir.Constant(_vector(ir.IntType(32)), [0] * LANES)
        for row, one in enumerate(sums):
            at = build.add(build.mul(columns, _INT(row)), column)
            value = build.insert_element(
                undefined, build.load(build.gep(self._values, [at])), ir.IntType(32)(0)
            )
            spread = build.shuffle_vector(value, undefined, same)
            build.store(build.call(self._fma, [weights, spread, build.load(one)]), one)

    def _load(
        self, base: ir.Value, place: ir.Value, size: int, further: ir.Value | int, element: ir.Type
    ) -> ir.Value:
        """`LANES` elements, `further` bytes behind the beginning of the `place`-th part of `size` bytes."""
        build = self._builder
        offset = build.add(
            build.mul(place, _INT(size)), _INT(further) if isinstance(further, int) else further
        )
        at = build.bitcast(build.gep(base, [offset]), _vector(element).as_pointer())
        return build.load(at, align=1)

    @contextmanager
    def _loop(self, end: ir.Value, by: int) -> Iterator[ir.Value]:
        """What is written within is done for 0, `by`, … below `end`, at least once."""
        build, before = self._builder, self._builder.block
        body = self._function.append_basic_block("loop")
        build.branch(body)
        build.position_at_end(body)
        count = build.phi(_INT)
        count.add_incoming(_INT(0), before)
        yield count
        following = build.add(count, _INT(by))
        count.add_incoming(following, build.block)
        after = self._function.append_basic_block("after")
        build.cbranch(build.icmp_unsigned("<", following, end), body, after)
        build.position_at_end(after)
