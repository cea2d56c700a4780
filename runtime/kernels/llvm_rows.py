"""Generates LLVM IR for what a layer does between products, row by row.

Each row is computed alone, in an order that depends on its size only: torch computes the ends of
its loops by other code than the rest, so a row's result may depend on how many rows there are.
"""

import ctypes
import functools
from collections.abc import Callable, Mapping

from llvmlite import ir

from runtime.kernels.llvm_ir import (
    F32,
    I16,
    I32,
    I64,
    PTR,
    each_share,
    element_ptr,
    even_share,
    loop,
    repeat,
)
from runtime.kernels.llvm_math import VectorProgram

LANES = 16  # on every processor, so that all add in the same order
FIELDS: list[tuple[str, type[ctypes.c_int64] | type[ctypes.c_double]]] = [
    ("next", ctypes.c_int64),
    ("rows", ctypes.c_int64),
    ("stride", ctypes.c_int64),  # of a row
    ("parameters", ctypes.c_int64),  # norm: weights (pieces, size); rotate: (rows, 2, size)
    ("out", ctypes.c_int64),  # (rows, pieces, size), dense; of `rotate` the rows themselves
    ("count", ctypes.c_int64),  # rows
    ("pieces", ctypes.c_int64),  # of a row; 1 for `gate`
    ("size", ctypes.c_int64),  # of a piece; at least LANES
    ("out_stride", ctypes.c_int64),  # of a row of what is converted, in elements of the result
    ("piece_stride", ctypes.c_int64),  # of a piece of it
    ("epsilon", ctypes.c_double),
    ("work_items", ctypes.c_int64),
]
ADDRESSES = ("rows", "parameters", "out")


def to_bfloat16(at: ir.IRBuilder, numbers: ir.Value) -> ir.Value:
    """Emit the bits of bfloat16 numbers: the nearest, an even one if there are two."""
    lanes = numbers.type.count
    words, halves = (ir.VectorType(kind, lanes) for kind in (I32, I16))
    bits = at.bitcast(numbers, words)
    odd = at.and_(at.lshr(bits, words([16] * lanes)), words([1] * lanes))
    rounded = at.add(bits, at.add(odd, words([0x7FFF] * lanes)))
    no_number = at.fcmp_unordered("uno", numbers, numbers)
    rounded = at.select(no_number, words([0x7FC00000] * lanes), rounded)
    return at.trunc(at.lshr(rounded, words([16] * lanes)), halves)


def to_float16(at: ir.IRBuilder, numbers: ir.Value) -> ir.Value:
    return at.fptrunc(numbers, ir.VectorType(ir.HalfType(), numbers.type.count))


def to_float32(_: ir.IRBuilder, numbers: ir.Value) -> ir.Value:
    return numbers


Round = Callable[[ir.IRBuilder, ir.Value], ir.Value]
CONVERTED: dict[str, Round] = {
    "to_bfloat16": to_bfloat16,
    "to_float16": to_float16,
    "to_float32": to_float32,
}


class RowArguments(ctypes.Structure):
    """Arguments of the functions; strides and sizes in floats."""

    _fields_ = FIELDS


class RowProgram(VectorProgram):
    """The IR module, with functions of RowArguments: `norm`, `gate`, `rotate`, and one that
    converts to each type of CONVERTED.
    """

    def __init__(self) -> None:
        super().__init__(LANES)
        double = ir.DoubleType()
        self.sqrt = ir.Function(self.module, ir.FunctionType(double, [double]), "llvm.sqrt.f64")
        self.function("norm", self.norm)
        self.function("gate", self.gate)
        self.function("rotate", self.rotate)
        for name, round_to in CONVERTED.items():
            self.function(name, functools.partial(self.convert, round_to))

    def function(
        self,
        name: str,
        body: Callable[[ir.IRBuilder, Mapping[str, ir.Value], ir.Value, ir.Value], None],
    ) -> None:
        """Emit a function that calls `body` for each piece of each row of its shares."""
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [PTR]), name)
        at = ir.IRBuilder(function.append_basic_block())
        args = {}
        for index, (field, kind) in enumerate(FIELDS):
            number = ir.DoubleType() if kind is ctypes.c_double else I64
            address = element_ptr(at, function.args[0], I64, I64(index))
            args[field] = at.load(address, typ=PTR if field in ADDRESSES else number, align=8)
        with each_share(at, args["work_items"]) as share:
            first, count = even_share(at, args["count"], share, args["work_items"])
            with repeat(at, count) as (index, _), loop(at, args["pieces"]) as (piece, _):
                body(at, args, at.add(first, index), piece)
        at.ret_void()

    def each_vector(
        self,
        at: ir.IRBuilder,
        size: ir.Value,
        body: Callable[[ir.Value], None],
    ) -> None:
        """Emit `body` at the begin of each vector; the last one ends with the piece, and overlaps
        the one before.
        """
        vectors = at.udiv(at.add(size, I64(LANES - 1)), I64(LANES))
        with loop(at, vectors) as (index, _):
            begin, last = at.mul(index, I64(LANES)), at.sub(size, I64(LANES))
            body(at.select(at.icmp_unsigned("<", begin, last), begin, last))

    def norm(
        self, at: ir.IRBuilder, args: Mapping[str, ir.Value], row: ir.Value, piece: ir.Value
    ) -> None:
        """Emit out = x weight / sqrt(mean(x^2) + epsilon)."""
        size, begin = args["size"], at.mul(piece, args["size"])
        source = element_ptr(at, args["rows"], F32, at.add(at.mul(row, args["stride"]), begin))
        weight = element_ptr(at, args["parameters"], F32, begin)
        place = at.mul(at.add(at.mul(row, args["pieces"]), piece), size)
        out = element_ptr(at, args["out"], F32, place)
        zero, lanes = ir.Constant(self.vector, None), self.ints(list(range(LANES)))
        with loop(at, at.udiv(size, I64(LANES)), [zero]) as (index, totals):
            x = self.get(at, self.lane_ptr(at, source, index))
            totals[0] = at.call(self.fma, [x, x, totals[0]])
        # The rest is the end of the last vector of the piece.
        rest = at.trunc(at.urem(size, I64(LANES)), I32)
        before = at.sub(I32(LANES), rest)
        fresh = at.icmp_signed(">=", lanes, self.repeat(at, before))
        x = self.get(at, element_ptr(at, source, F32, at.sub(size, I64(LANES))))
        x = at.select(fresh, x, zero)
        total: ir.Value = at.call(self.fma, [x, x, totals[0]])
        width = LANES
        while width > 1:  # add the upper half to the lower half
            width //= 2
            half = ir.VectorType(I32, LANES)([(lane + width) % LANES for lane in range(LANES)])
            total = at.fadd(total, at.shuffle_vector(total, total, half))
        squares = at.fpext(at.extract_element(total, I32(0)), ir.DoubleType())
        mean = at.fdiv(squares, at.uitofp(size, ir.DoubleType()))
        root = at.call(self.sqrt, [at.fadd(mean, args["epsilon"])])
        factor = at.fptrunc(at.fdiv(ir.DoubleType()(1.0), root), F32)
        factors = self.repeat(at, factor)

        def scale(begin: ir.Value) -> None:
            x = self.get(at, element_ptr(at, source, F32, begin))
            scaled = at.fmul(x, factors)
            weights = self.get(at, element_ptr(at, weight, F32, begin))
            self.put(at, at.fmul(scaled, weights), element_ptr(at, out, F32, begin))

        self.each_vector(at, size, scale)

    def gate(
        self, at: ir.IRBuilder, args: Mapping[str, ir.Value], row: ir.Value, piece: ir.Value
    ) -> None:
        """Emit out = silu(first half of the row) x second half."""
        source = element_ptr(at, args["rows"], F32, at.mul(row, args["stride"]))
        upper = element_ptr(at, source, F32, args["size"])
        out = element_ptr(at, args["out"], F32, at.mul(row, args["size"]))
        zero, one = ir.Constant(self.vector, None), self.vector_of(1.0)

        def silu(begin: ir.Value) -> None:
            x = self.get(at, element_ptr(at, source, F32, begin))
            positive = at.fcmp_ordered(">", x, zero)
            # exp of what is not positive: it cannot overflow. No number stays none.
            power = self.exponential(at, at.select(positive, at.fneg(x), x))
            share = at.fdiv(at.select(positive, one, power), at.fadd(one, power))
            more = self.get(at, element_ptr(at, upper, F32, begin))
            self.put(at, at.fmul(at.fmul(x, share), more), element_ptr(at, out, F32, begin))

        self.each_vector(at, args["size"], silu)

    def rotate(
        self, at: ir.IRBuilder, args: Mapping[str, ir.Value], row: ir.Value, piece: ir.Value
    ) -> None:
        """Emit x = x cos + (x, its halves exchanged) sin, in place, for a head of a row."""
        size, half = args["size"], at.udiv(args["size"], I64(2))
        place = at.add(at.mul(row, args["stride"]), at.mul(piece, size))
        x = element_ptr(at, args["rows"], F32, place)
        table = element_ptr(at, args["parameters"], F32, at.mul(at.mul(row, I64(2)), size))
        with loop(at, half) as (index, _):
            places = index, at.add(index, half)
            numbers = [at.load(element_ptr(at, x, F32, one), typ=F32, align=4) for one in places]
            for one, own, other in zip(places, numbers, reversed(numbers), strict=True):
                cos, sin = (
                    at.load(element_ptr(at, table, F32, entry), typ=F32, align=4)
                    for entry in (one, at.add(one, size))
                )
                turned = at.fadd(at.fmul(own, cos), at.fmul(other, sin))
                at.store(turned, element_ptr(at, x, F32, one), align=4)

    def convert(
        self,
        round_to: Round,
        at: ir.IRBuilder,
        args: Mapping[str, ir.Value],
        row: ir.Value,
        piece: ir.Value,
    ) -> None:
        """Emit out = x, rounded to the nearest number of the type."""
        size = args["size"]
        place = at.add(at.mul(row, args["stride"]), at.mul(piece, size))
        source = element_ptr(at, args["rows"], F32, place)
        goal = at.add(at.mul(row, args["out_stride"]), at.mul(piece, args["piece_stride"]))

        def one(begin: ir.Value) -> None:
            found = round_to(at, self.get(at, element_ptr(at, source, F32, begin)))
            kind = found.type.element
            at.store(found, element_ptr(at, args["out"], kind, at.add(goal, begin)), align=2)

        self.each_vector(at, size, one)

    def repeat(self, at: ir.IRBuilder, number: ir.Value) -> ir.Value:
        nothing = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
        one = at.insert_element(nothing, number, I32(0))
        return at.shuffle_vector(one, nothing, self.ints([0] * LANES))
