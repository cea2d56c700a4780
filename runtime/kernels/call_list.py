"""Runs a list of compiled functions in one call, without Python between them."""

import ctypes
import functools
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import binding

from runtime.kernels.jit import compile_module, openmp_library
from runtime.kernels.llvm_calls import CALL_PROGRAM, Call, CallArguments

CALL = np.dtype(Call)
Structs = npt.NDArray[np.void]  # of a ctypes.Structure: one field of all at a time


@functools.cache
def load_runner() -> tuple[Any, int, object]:
    """Return the function, the address of OpenMP's, and the owner of the machine code."""
    engine, (run,) = compile_module(
        CALL_PROGRAM,
        ("run",),
        binding.get_host_cpu_name(),
        binding.get_host_cpu_features().flatten(),
    )
    return run, function_address(openmp_library().GOMP_parallel), engine


def function_address(function: Any) -> int:
    """Return where a C function begins."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def structs(kind: type[ctypes.Structure], count: int, /, **fields: Any) -> Structs:
    """Return `count` structures in one array, each field a number for all or one for each."""
    found = np.zeros(count, dtype=np.dtype(kind))
    for name, value in fields.items():
        found[name] = value
    return found


def addresses(structures: Structs) -> npt.NDArray[np.int64]:
    """Return where each of dense structures lies."""
    return structures.ctypes.data + structures.itemsize * np.arange(len(structures))


def run_calls(calls: Structs) -> None:
    """Run dense calls (CALL, any shape) in order, without the GIL."""
    run, parallel, _ = load_runner()
    first = calls.ctypes.data
    arguments = CallArguments(first, first + calls.nbytes, parallel)
    run(ctypes.addressof(arguments))
