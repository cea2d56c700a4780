"""What a layer does between products: norms, gates and rotations of float32 rows on a CPU.

One call does what torch does in three to five, and a row's result depends on that row alone.
"""

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from llvmlite import binding

from runtime.kernels.jit import compile_module, is_supported, run_shares
from runtime.kernels.llvm_rows import CONVERTED, LANES, RowArguments, RowProgram

FLOATS_PER_THREAD = 1 << 15  # fewer are not worth waking another thread


@dataclass(frozen=True, slots=True)
class RowKernels:
    """The compiled functions of RowProgram."""

    norm: Any
    gate: Any
    rotate: Any
    convert: Mapping[torch.dtype, Any]  # from float32
    engine: object  # owns the machine code


@functools.cache
def load_row_kernels() -> RowKernels:
    """Compile the functions. Raises RuntimeError if LLVM does not support the processor."""
    engine, (norm, gate, rotate, *convert) = compile_module(
        RowProgram().module,
        ("norm", "gate", "rotate", *CONVERTED),
        binding.get_host_cpu_name(),
        binding.get_host_cpu_features().flatten(),
    )
    types = (getattr(torch, name.removeprefix("to_")) for name in CONVERTED)
    return RowKernels(norm, gate, rotate, dict(zip(types, convert, strict=True)), engine)


def has_kernel(rows: torch.Tensor, size: int) -> bool:
    """Return whether the kernels support such rows in pieces of `size`."""
    return (
        rows.dtype == torch.float32
        and rows.device.type == "cpu"
        and rows.stride(-1) == 1
        and size >= LANES
        and is_supported()
    )


def rms_norm(rows: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return x * weight / sqrt(mean(x^2) + epsilon) over the last dimension.

    rows    (n, size) or (n, pieces, size), dense but for the stride of a row
    weight  float32 (size,) or (pieces, size)
    """
    out = torch.empty(rows.shape)
    run(load_row_kernels().norm, rows, weight, out, weight.numel() // weight.shape[-1], epsilon)
    return out


def silu_gate(rows: torch.Tensor) -> torch.Tensor:
    """Return silu(first half) * second half of each row: (n, 2 size) -> (n, size)."""
    out = torch.empty(len(rows), rows.shape[1] // 2)
    run(load_row_kernels().gate, rows, rows, out, 1)
    return out


def rotate(heads: torch.Tensor, angles: torch.Tensor) -> None:
    """Rotate `heads` (n, heads, dim) in place: x cos + roll(x, dim / 2) sin.

    angles  float32 (n, 2, dim): cosines and sines
    """
    run(load_row_kernels().rotate, heads, angles, heads, heads.shape[1])


def run(
    function: Any,
    rows: torch.Tensor,
    parameters: torch.Tensor,
    out: torch.Tensor,
    pieces: int,
    epsilon: float = 0.0,
) -> None:
    """Run a function of RowProgram over all rows."""
    threads = threads_for(rows.numel())
    arguments = RowArguments(
        rows=rows.data_ptr(),
        stride=rows.stride(0),
        parameters=parameters.data_ptr(),
        out=out.data_ptr(),
        count=len(rows),
        pieces=pieces,
        size=out.shape[-1],
        epsilon=epsilon,
        work_items=threads,
    )
    run_shares(function, ctypes.addressof(arguments), threads)


def threads_for(floats: int) -> int:
    """Return the threads that share work on so many numbers."""
    return min(torch.get_num_threads(), 1 + floats // FLOATS_PER_THREAD)
