"""Generates LLVM IR that reads keys or values of a head in blocks of slots, as float32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from llvmlite import ir

from runtime.kernels.llvm_ir import F32, I8, I16, I32, I64, ceil_div, element_ptr, loop
from runtime.kernels.llvm_math import VectorProgram

LANES = 16  # on every processor, so that all add in the same order
BLOCK_SLOTS = 32  # widened at a time; they stay in the first-level cache


def padded(dim: int) -> int:
    """Return the numbers of a head's vectors."""
    return -(-dim // LANES) * LANES


class WideProgram(VectorProgram):
    """An IR module that reads slots of `dim` numbers of `dtype`; each takes `vectors` vectors."""

    def __init__(self, dtype: torch.dtype, dim: int) -> None:
        super().__init__(LANES)
        self.dtype, self.dim, self.vectors = dtype, dim, padded(dim) // LANES

    @contextmanager
    def each_block(
        self, at: ir.IRBuilder, base: ir.Value, end: ir.Value, wide: ir.Value
    ) -> Iterator[tuple[ir.Value, ir.Value]]:
        """Repeat the body for each block of slots, widened to float32, padded with zeros.

        Yields its first slot and their number.
        """
        with loop(at, ceil_div(at, end, BLOCK_SLOTS)) as (index, _):
            first = at.mul(index, I64(BLOCK_SLOTS))
            left = at.sub(end, first)
            count = at.select(at.icmp_unsigned("<", left, I64(BLOCK_SLOTS)), left, I64(BLOCK_SLOTS))
            source = self.address(at, base, at.mul(first, I64(self.dim)))
            with loop(at, count) as (slot, _):
                self.widen(
                    at,
                    self.address(at, source, at.mul(slot, I64(self.dim))),
                    self.lane_ptr(at, wide, at.mul(slot, I64(self.vectors))),
                )
            yield first, count

    def widen(self, at: ir.IRBuilder, source: ir.Value, goal: ir.Value) -> None:
        """Emit a copy of a slot's numbers as float32."""
        whole, rest = divmod(self.dim, LANES)
        for index in range(whole):
            self.widen_one(at, source, goal, I64(index * LANES), LANES)
        if rest:
            self.put(at, ir.Constant(self.vector, None), self.lane_ptr(at, goal, I64(whole)))
            with loop(at, I64(rest)) as (index, _):
                self.widen_one(at, source, goal, at.add(index, I64(whole * LANES)), 1)

    def widen_one(
        self, at: ir.IRBuilder, source: ir.Value, goal: ir.Value, place: ir.Value, lanes: int
    ) -> None:
        address = self.address(at, source, place)
        if self.dtype == torch.float32:
            found = at.load(address, typ=ir.VectorType(F32, lanes), align=4)
        elif self.dtype == torch.float16:
            stored = at.load(address, typ=ir.VectorType(ir.HalfType(), lanes), align=2)
            found = at.fpext(stored, ir.VectorType(F32, lanes))
        else:
            words = ir.VectorType(I32, lanes)
            stored = at.load(address, typ=ir.VectorType(I16, lanes), align=2)
            shifted = at.shl(at.zext(stored, words), words([16] * lanes))
            found = at.bitcast(shifted, ir.VectorType(F32, lanes))
        at.store(found, element_ptr(at, goal, F32, place), align=4)

    def address(self, at: ir.IRBuilder, base: ir.Value, count: ir.Value) -> ir.Value:
        """Return the address `count` keys' or values' elements after `base`."""
        return element_ptr(at, base, I8, at.mul(count, I64(self.dtype.itemsize)))
