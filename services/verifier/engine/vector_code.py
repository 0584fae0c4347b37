"""Writing small kernels in LLVM's intermediate representation, and compiling them for the processor at hand.

llvmlite comes with vLLM. Vectors have `LANES` float32 values: one register of AVX-512, two of AVX, four of NEON.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from llvmlite import binding, ir
from llvmlite.binding import ffi

LANES: Final = 16
BYTE: Final = ir.IntType(8)
FLOAT: Final = ir.FloatType()
HALF: Final = ir.HalfType()
SHORT: Final = ir.IntType(16)
INT: Final = ir.IntType(32)
LONG: Final = ir.IntType(64)
_NAME: Final = "kernel"
_C_TYPES: Final[dict[ir.Type, Any]] = {LONG: ctypes.c_int64, FLOAT: ctypes.c_float}

# llvmlite's handle of its library takes any attribute for a function of it, `__dict__` too. vLLM looks into the `__dict__`
# of every module's values when it makes a worker, and finds no mapping.
ffi.lib._fntab.setdefault("__dict__", {})


def vector(element: ir.Type) -> ir.VectorType:
    """`LANES` of a type."""
    return ir.VectorType(element, LANES)


VECTOR: Final = vector(FLOAT)


def constant(value: float, element: ir.Type = FLOAT) -> ir.Constant:
    """`LANES` times the same number."""
    return ir.Constant(vector(element), [value] * LANES)


class Kernel:
    """A function that is being written: `build` writes instructions, `arguments` are its own."""

    def __init__(self, arguments: Sequence[ir.Type]) -> None:
        """Pointers among the arguments are to memory that no other one is to."""
        self._module = ir.Module()
        self._module.triple = binding.get_process_triple()
        self._function = ir.Function(self._module, ir.FunctionType(ir.VoidType(), arguments), _NAME)
        self.arguments: tuple[ir.Argument, ...] = self._function.args
        for argument in self.arguments:
            if isinstance(argument.type, ir.PointerType):
                argument.add_attribute("noalias")
        self.build = ir.IRBuilder(self._function.append_basic_block("entry"))

    def call(self, name: str, *values: ir.Value) -> ir.Value:
        """One of LLVM's own functions of vectors, such as `fma`."""
        full = f"llvm.{name}.v{LANES}f32"
        found = self._module.globals.get(full)
        if found is None:
            found = ir.Function(self._module, ir.FunctionType(VECTOR, [VECTOR] * len(values)), full)
        return self.build.call(found, values)

    def offset(self, base: ir.Value, offset: ir.Value | int, kind: ir.Type) -> ir.Value:
        """The address of a `kind` so many elements (of what `base` points to) behind it."""
        offset = LONG(offset) if isinstance(offset, int) else offset
        return self.build.bitcast(self.build.gep(base, [offset]), kind.as_pointer())

    def load(self, base: ir.Value, offset: ir.Value | int, element: ir.Type = FLOAT) -> ir.Value:
        """`LANES` elements from there, wherever they lie in memory."""
        return self.build.load(self.offset(base, offset, vector(element)), align=1)

    def store(self, values: ir.Value, base: ir.Value, offset: ir.Value | int) -> None:
        """A vector there."""
        self.build.store(values, self.offset(base, offset, values.type), align=1)

    def spread(self, value: ir.Value) -> ir.Value:
        """`LANES` times one value that is computed."""
        undefined = ir.Constant(vector(value.type), ir.Undefined)
        one = self.build.insert_element(undefined, value, INT(0))
        return self.build.shuffle_vector(one, undefined, constant(0, INT))

    @contextmanager
    def loop(self, end: ir.Value, by: int = 1) -> Iterator[ir.Value]:
        """What is written within is done for 0, `by`, … below `end`, at least once."""
        build, before = self.build, self.build.block
        body = self._function.append_basic_block("loop")
        build.branch(body)
        build.position_at_end(body)
        count = build.phi(LONG)
        count.add_incoming(LONG(0), before)
        yield count
        following = build.add(count, LONG(by))
        count.add_incoming(following, build.block)
        after = self._function.append_basic_block("after")
        build.cbranch(build.icmp_unsigned("<", following, end), body, after)
        build.position_at_end(after)

    def compiled(self) -> Callable[..., None]:
        """What is written is all: the function, for addresses and numbers in the order of its arguments. It lets other
        threads run."""
        self.build.ret_void()
        machine = _machine()
        module = binding.parse_assembly(str(self._module))
        tuning = binding.create_pipeline_tuning_options(speed_level=3)
        tuning.slp_vectorization = False
        builder = binding.create_pass_builder(machine, tuning)
        builder.getModulePassManager().run(module, builder)
        engine = binding.create_mcjit_compiler(module, machine)
        engine.finalize_object()
        kinds = [_C_TYPES.get(argument.type, ctypes.c_void_p) for argument in self.arguments]
        function: Any = ctypes.CFUNCTYPE(None, *kinds)(engine.get_function_address(_NAME))
        function.engine = engine  # it owns the function's memory
        return function  # type: ignore[no-any-return]


def _machine() -> Any:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    found = binding.get_host_cpu_features()
    features = [found.flatten(), *(["-prefer-256-bit"] if found.get("avx512f") else [])]
    return binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=",".join(features), opt=3, jit=True
    )
