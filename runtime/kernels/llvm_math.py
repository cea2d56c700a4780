"""Arithmetic on vectors of floats in LLVM IR, the same in every lane."""

from llvmlite import ir

from runtime.kernels.llvm_ir import F32, I32, element_ptr

# exp(x) = 2^n exp(r), n = round(x / ln 2), with the Taylor polynomial of exp(r), |r| <= ln(2) / 2.
LEAST = -87.0  # below it the result would be denormal; it counts as zero
LOG2_E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
TAYLOR = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)


class VectorProgram:
    """An IR module with vectors of `lanes` floats."""

    def __init__(self, lanes: int) -> None:
        self.module, self.lanes = ir.Module(), lanes
        self.vector, self.ints = ir.VectorType(F32, lanes), ir.VectorType(I32, lanes)
        self.fma = self.intrinsic("llvm.fma", 3)
        self.round = self.intrinsic("llvm.roundeven", 1)

    def intrinsic(self, name: str, arguments: int) -> ir.Function:
        kind = ir.FunctionType(self.vector, [self.vector] * arguments)
        return ir.Function(self.module, kind, f"{name}.v{self.lanes}f32")

    def exponential(self, at: ir.IRBuilder, power: ir.Value) -> ir.Value:
        """Emit exp(power) of non-positive numbers, 0 below LEAST."""
        small = at.fcmp_ordered("<", power, self.vector_of(LEAST))
        x = at.select(small, self.vector_of(LEAST), power)
        n = at.call(self.round, [at.fmul(x, self.vector_of(LOG2_E))])
        x = at.call(self.fma, [n, self.vector_of(-LN2_HIGH), x])
        x = at.call(self.fma, [n, self.vector_of(-LN2_LOW), x])
        found = self.vector_of(TAYLOR[0])
        for coefficient in TAYLOR[1:]:
            found = at.call(self.fma, [found, x, self.vector_of(coefficient)])
        exponent = at.shl(at.fptosi(n, self.ints), self.ints([23] * self.lanes))
        found = at.bitcast(at.add(at.bitcast(found, self.ints), exponent), self.vector)
        return at.select(small, ir.Constant(self.vector, None), found)

    def lane_ptr(self, at: ir.IRBuilder, base: ir.Value, count: ir.Value) -> ir.Value:
        return element_ptr(at, base, self.vector, count)

    def get(self, at: ir.IRBuilder, address: ir.Value) -> ir.Value:
        return at.load(address, typ=self.vector, align=4)

    def put(self, at: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
        at.store(value, address, align=4)

    def vector_of(self, number: float) -> ir.Value:
        return self.vector([number] * self.lanes)

    def broadcast(self, at: ir.IRBuilder, address: ir.Value) -> ir.Value:
        nothing = ir.Constant(self.vector, ir.Undefined)
        one = at.insert_element(nothing, at.load(address, typ=F32, align=4), I32(0))
        return at.shuffle_vector(one, nothing, self.ints([0] * self.lanes))
