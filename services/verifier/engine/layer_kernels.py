"""What lies between the matrices of a Llama layer, as kernels: a sum and its norm, and the gate.

In PyTorch each is several calls, and a call costs more than the arithmetic of a few rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Final

from llvmlite import ir

from services.verifier.engine.vector_code import (
    FLOAT,
    INT,
    LANES,
    LONG,
    VECTOR,
    Kernel,
    constant,
    vector,
)

_LOG_2: Final = 355 / 512
"""In few bits, so that multiples are exact; `_LOG_2_REST` is what it lacks (Cody and Waite 1980)."""
_LOG_2_REST: Final = math.log(2) - _LOG_2
_LARGEST: Final = 87.0
"""Powers of e up to this one, and down to its reciprocal, are normal float32."""
_TERMS: Final = 8


@cache
def add_norm() -> Callable[..., None]:
    """(state, added, weight, normed: addresses; rows, columns, eps): state += added, and normed = RMSNorm of it.

    All are `[rows, columns]` float32, `weight` is [columns]; columns are a multiple of `LANES`.
    """
    kernel = Kernel([FLOAT.as_pointer()] * 4 + [LONG, LONG, FLOAT])
    state, added, weight, normed, rows, columns, eps = kernel.arguments
    build = kernel.build
    squares = build.alloca(VECTOR)
    size = kernel.spread(build.uitofp(columns, FLOAT))
    with kernel.loop(rows) as row:
        first = build.mul(row, columns)
        build.store(constant(0.0), squares)
        with kernel.loop(columns, LANES) as column:
            at = build.add(first, column)
            both = build.fadd(kernel.load(state, at), kernel.load(added, at))
            kernel.store(both, state, at)
            build.store(kernel.call("fma", both, both, build.load(squares)), squares)
        total = _sum(kernel, build.load(squares))
        mean = build.fdiv(kernel.spread(total), size)
        scale = build.fdiv(constant(1.0), kernel.call("sqrt", build.fadd(mean, kernel.spread(eps))))
        with kernel.loop(columns, LANES) as column:
            at = build.add(first, column)
            scaled = build.fmul(kernel.load(state, at), scale)
            kernel.store(build.fmul(scaled, kernel.load(weight, column)), normed, at)
    return kernel.compiled()


@cache
def gated() -> Callable[..., None]:
    """(gate_up, out: addresses; rows, width): out = silu(gate) · up, of gate_up `[rows, 2 · width]` float32."""
    kernel = Kernel([FLOAT.as_pointer(), FLOAT.as_pointer(), LONG, LONG])
    gate_up, out, rows, width = kernel.arguments
    build = kernel.build
    with kernel.loop(rows) as row:
        first = build.mul(row, width)
        with kernel.loop(width, LANES) as column:
            at = build.add(build.add(first, first), column)
            gate, up = kernel.load(gate_up, at), kernel.load(gate_up, build.add(at, width))
            shrunk = build.fadd(constant(1.0), _exp(kernel, build.fneg(gate)))
            kernel.store(build.fmul(build.fdiv(gate, shrunk), up), out, build.add(first, column))
    return kernel.compiled()


def _sum(kernel: Kernel, values: ir.Value) -> ir.Value:
    """Of a vector's elements, by halves."""
    build, half = kernel.build, LANES // 2
    while half:
        order = ir.Constant(vector(INT), [(lane + half) % LANES for lane in range(LANES)])
        values = build.fadd(values, build.shuffle_vector(values, values, order))
        half //= 2
    return build.extract_element(values, INT(0))


def _exp(kernel: Kernel, values: ir.Value) -> ir.Value:
    """e to the power of each: two to a whole power, times a series for what is left of the exponent, at most ln 2 / 2."""
    build = kernel.build
    values = kernel.call("minnum", kernel.call("maxnum", values, constant(-_LARGEST)), constant(_LARGEST))
    power = kernel.call("rint", build.fmul(values, constant(1 / math.log(2))))
    rest = kernel.call("fma", power, constant(-_LOG_2), values)
    rest = kernel.call("fma", power, constant(-_LOG_2_REST), rest)
    series = constant(1 / math.factorial(_TERMS - 1))
    for term in reversed(range(_TERMS - 1)):
        series = kernel.call("fma", series, rest, constant(1 / math.factorial(term)))
    exponent = build.add(build.fptosi(power, vector(INT)), constant(127, INT))
    return build.fmul(series, build.bitcast(build.shl(exponent, constant(23, INT)), VECTOR))
