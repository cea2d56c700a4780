"""Attention of the rows of one text over its cache, on a CPU.

Unlike torch's, it gives a row the same result whatever rows are beside it and whatever hidden
guesses lie between the slots that it sees: see runtime.kernels.llvm_attention. With one row it also
takes a tenth of the time of torch's in bfloat16.
"""

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import binding

from runtime.kernels.jit import compile_module, is_supported, registers_of, run_shares
from runtime.kernels.llvm_attention import (
    AttentionArguments,
    AttentionProgram,
    scratch_floats,
    weight_floats,
)

BLOCK_QUERIES = 16  # of a head of keys, computed at a time: their weights stay in the cache
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class AttentionKernel:
    """The compiled function of AttentionProgram."""

    work: Any  # a C function
    engine: object  # owns the machine code


@functools.cache
def load_attention(dtype: torch.dtype, dim: int, scale: float) -> AttentionKernel:
    """Return the kernel for keys of this type and size; the first call takes half a second.

    Raises LookupError for an unknown processor or type, RuntimeError if LLVM does not support it.
    """
    features = binding.get_host_cpu_features()
    if registers_of(features) is None or dtype not in DTYPES:
        raise LookupError(f"no attention kernel for {dtype} on this processor")
    program = AttentionProgram(dtype, dim, scale)
    engine, (work,) = compile_module(
        program.module, ("attend",), binding.get_host_cpu_name(), features.flatten()
    )
    return AttentionKernel(work, engine)


@functools.cache
def has_attention(device: torch.device, dtype: torch.dtype, dim: int, scale: float) -> bool:
    """Return whether Attention supports such keys on this device and processor."""
    if device.type != "cpu" or not is_supported():
        return False
    try:
        load_attention(dtype, dim, scale)
    except (LookupError, RuntimeError):
        return False
    return True


class Attention:
    """Computes attention for the rows of one text, layer by layer.

    shape  rows, heads, heads of keys, dim
    slots  of the cache, those of the rows included
    mask   (rows, slots), negative where a slot is hidden; None: no slot is hidden. Each row sees
           a slot
    """

    def __init__(
        self,
        kernel: AttentionKernel,
        shape: tuple[int, int, int, int],
        slots: int,
        mask: npt.NDArray[np.float32] | None,
    ) -> None:
        rows, heads, kv_heads, dim = shape
        group = heads // kv_heads
        self.kernel, self._shape = kernel, (rows, heads * dim)
        blocks = -(-rows * group // max(group, BLOCK_QUERIES))
        starts = rows * np.arange(blocks + 1) // blocks
        self._ends = np.full(blocks, slots, dtype=np.int64)
        self._mask, first = np.zeros((rows, 0), dtype=np.float32), slots
        if mask is not None and (hidden := mask < 0).any():
            first = int(hidden.any(axis=0).argmax())
            self._mask = np.zeros((rows, weight_floats(slots - first)), dtype=np.float32)
            self._mask[:, : slots - first] = mask[:, first:]
            of_rows = slots - (~hidden[:, ::-1]).argmax(axis=1)
            self._ends = np.maximum.reduceat(of_rows, starts[:-1])
        block_queries = group * int(np.diff(starts).max())
        shares = min(torch.get_num_threads(), kv_heads * blocks)
        room = scratch_floats(block_queries, dim, slots)
        self._scratch = torch.empty(shares * room)
        self.arguments = AttentionArguments(
            mask=self._mask.ctypes.data,
            mask_stride=self._mask.shape[1],
            first=first,
            ends=self._ends.ctypes.data,
            rows=rows,
            kv_heads=kv_heads,
            group=group,
            blocks=blocks,
            block_queries=block_queries,
            weight_stride=weight_floats(slots),
            out_stride=heads * dim,
            scratch=self._scratch.data_ptr(),
            scratch_stride=room,
            work_items=shares,
        )
        self._address = ctypes.addressof(self.arguments)

    def __call__(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Return float32 (rows, heads * dim).

        queries       float32 (rows, heads, dim), dense but for the stride of a row
        keys, values  (kv heads, slots or more, dim), dense but for the stride of a head
        """
        out = torch.empty(self._shape)
        arguments = self.arguments
        arguments.queries, arguments.query_stride = queries.data_ptr(), queries.stride(0)
        arguments.keys, arguments.values = keys.data_ptr(), values.data_ptr()
        arguments.head_stride, arguments.out = keys.stride(0), out.data_ptr()
        arguments.next = 0
        run_shares(self.kernel.work, self._address, arguments.work_items)
        return out
