"""Generates LLVM IR for products of bfloat16 rows with a bfloat16 matrix, summed in float32.

The instruction `vdpbf16ps` (AVX512_BF16) multiplies pairs of neighbours of a row with pairs of
neighbours of the matrix and adds both products to a float32 sum: twice the work of an FMA, and no
line has to be widened. A line of a panel thus holds two elements of a row for each output.

The instruction treats denormal numbers as zero and rounds each sum to the nearest float32. The
order of the sums does not depend on the number of rows, so a row's result depends on that row
alone. AMX tiles, which hold 16 rows, are not used: no machine was at hand to test them.
"""

import torch
from llvmlite import ir

from runtime.kernels.llvm_ir import I32, Program, Registers, element_ptr

LANES = 16  # floats per register of AVX-512


class BFloatType(ir.Type):
    """LLVM's `bfloat`, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloatType)

    def __hash__(self) -> int:
        return hash(BFloatType)


class PairProgram(Program):
    """As Program; a row's element is a 32-bit word of two bfloat16 numbers."""

    def __init__(self, registers: Registers) -> None:
        self.pairs = ir.VectorType(BFloatType(), 2 * LANES)
        super().__init__(torch.float32, registers)

    def declare(self) -> None:
        self.dot = ir.Function(
            self.module,
            ir.FunctionType(self.vector, [self.vector, self.pairs, self.pairs]),
            "llvm.x86.avx512bf16.dpbf16ps.512",
        )

    def weights(self, at: ir.IRBuilder, line: ir.Value) -> list[ir.Value]:
        """Return the two vectors of pairs of a line."""
        return [
            at.load(
                element_ptr(at, line, self.pairs, ir.IntType(64)(half)), typ=self.pairs, align=4
            )
            for half in (0, 1)
        ]

    def multiply_add(
        self, at: ir.IRBuilder, weights: ir.Value, number: ir.Value, total: ir.Value
    ) -> ir.Value:
        return at.call(self.dot, [total, weights, at.bitcast(number, self.pairs)])

    def broadcast(self, at: ir.IRBuilder, address: ir.Value) -> ir.Value:
        return self.repeat(at, at.load(address, typ=I32, align=4))
