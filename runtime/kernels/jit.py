"""Compiles products of a few rows with a matrix for the local processor, with LLVM."""

import ctypes
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llvmlite import binding

from runtime.kernels.llvm_bf16 import PairProgram
from runtime.kernels.llvm_ir import Arguments, Program, Registers

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kernel:
    """Computes products with matrices in panels of `width` outputs."""

    width: int
    transpose: Callable[[int], None]
    work: Any  # a C function with an address
    engine: object  # owns the machine code

    def __call__(self, arguments: Arguments) -> None:
        """Run on `arguments.work_items` of torch's threads, without the GIL."""
        address = ctypes.addressof(arguments)
        if arguments.transposed != arguments.rows:
            self.transpose(address)
        run_shares(self.work, address, arguments.work_items)


def run_shares(work: Any, address: int, work_items: int) -> None:
    """Call `work` on so many of torch's threads, without the GIL."""
    if work_items == 1:
        work(address)
    else:
        openmp_library().GOMP_parallel(
            work, ctypes.c_void_p(address), ctypes.c_uint(work_items), ctypes.c_uint(0)
        )


@functools.cache
def is_supported() -> bool:
    """Return whether this processor has kernels, by compiling one, and torch has threads for it."""
    if not hasattr(openmp_library(), "GOMP_parallel"):
        return False
    try:
        load_kernel(torch.bfloat16)
    except (LookupError, RuntimeError) as error:
        log.warning("using torch for matrix products: %s", error)
        return False
    return True


@functools.cache
def has_pairs() -> bool:
    """Return whether this processor multiplies pairs of bfloat16, by compiling a kernel."""
    try:
        return is_supported() and load_kernel(torch.bfloat16, pairs=True) is not None
    except (LookupError, RuntimeError):
        return False


@functools.cache
def load_kernel(dtype: torch.dtype, pairs: bool = False) -> Kernel:
    """Return the kernel for matrices of this type; the first call takes half a second.

    With `pairs` the rows are in bfloat16 like the matrix, else in float32. Raises LookupError for a
    processor without kernels of this kind, RuntimeError if LLVM does not support it.
    """
    features = binding.get_host_cpu_features()
    registers = registers_of(features)
    if registers is None or (pairs and not features.get("avx512bf16")):
        raise LookupError("no kernel is known for this processor")
    program = PairProgram(registers) if pairs else Program(dtype, registers)
    return compile_kernel(program, binding.get_host_cpu_name(), features.flatten())


def registers_of(features: Mapping[str, bool]) -> Registers | None:
    """Return the register set, or None for an unknown processor."""
    if features.get("avx512f"):
        return Registers(16, 14)
    if features.get("avx2") and features.get("fma") and features.get("f16c"):
        return Registers(8, 6)
    return None


@functools.cache
def openmp_library() -> ctypes.CDLL:
    """Return the process's own symbols: torch brings OpenMP, whose threads the kernels share."""
    return ctypes.CDLL(None)


def compile_kernel(program: Program, processor: str, features: str) -> Kernel:
    names = ("transpose", "work")
    engine, (transpose, work) = compile_module(program.module, names, processor, features)
    return Kernel(2 * program.lanes, transpose, work, engine)


def compile_module(
    source: Any, names: Sequence[str], processor: str, features: str
) -> tuple[object, list[Any]]:
    """Return the owner of the machine code, and the functions of these names."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=processor,
        features=f"{features},-prefer-256-bit",  # or vectors of 512 bits would be split in two
        opt=3,
    )
    module = binding.parse_assembly(str(source))
    module.verify()
    passes = binding.create_pass_builder(
        machine, binding.create_pipeline_tuning_options(speed_level=3)
    )
    passes.getModulePassManager().run(module, passes)
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    return engine, [call(engine.get_function_address(name)) for name in names]
