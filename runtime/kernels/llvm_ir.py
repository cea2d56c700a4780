"""Generates LLVM IR for products of a few rows with a matrix.

A matrix is stored in panels. A panel is two vectors of outputs wide and as long as a row. Its
lines, one per element of a row, are adjacent in memory, so the whole matrix is one stream. A block
of rows keeps its sums in registers while a panel passes: each line is read once, widened to float32
and multiplied with one number of each row. A block of rows thus costs little more than reading the
matrix, and 16-bit weights cost half as much as 32-bit weights.

Each sum adds its products in order with one rounding each, so a row's result depends on that row
alone, whatever the other rows and the number of threads.
"""

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from llvmlite import ir

I64 = ir.IntType(64)
I32 = ir.IntType(32)
I16 = ir.IntType(16)
I8 = ir.IntType(8)
F32 = ir.FloatType()
PTR = ir.PointerType()

# Lines of a panel that all rows are multiplied with before the next ones; they stay in the cache.
LINES_PER_PASS = 512
CACHE_LINE = 64  # bytes
TRANSPOSE_TILE = 16  # elements of a row transposed at once: one cache line


class Arguments(ctypes.Structure):
    """Arguments of `transpose` and `work`, which run in this order. Strides are in floats."""

    _fields_ = [
        ("next", ctypes.c_int64),  # next share; the first field of all arguments
        ("rows", ctypes.c_int64),  # (count, inner), dense
        ("transposed", ctypes.c_int64),  # room for (inner, count)
        ("count", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("matrix", ctypes.c_int64),
        ("panels", ctypes.c_int64),
        (
            "addend",
            ctypes.c_int64,
        ),  # (count, outputs of all panels), added to the sums; stride 0: the same for all rows
        ("addend_stride", ctypes.c_int64),
        ("out", ctypes.c_int64),  # (count, outputs of all panels)
        ("out_stride", ctypes.c_int64),
        ("work_items", ctypes.c_int64),  # shares of the panels, one per thread
    ]


@dataclass(frozen=True, slots=True)
class Registers:
    """The floats per register, and the rows of a block.

    A row takes two sums, next to a line of the matrix and its widened form.
    """

    lanes: int
    rows: int


class Program:
    """The IR module, with the functions `transpose` and `work`."""

    def __init__(self, dtype: torch.dtype, registers: Registers) -> None:
        self.module = ir.Module()
        self.dtype, self.lanes, self.line = (
            dtype,
            registers.lanes,
            2 * registers.lanes * dtype.itemsize,
        )
        self.vector = ir.VectorType(F32, self.lanes)
        self.declare()
        self.prefetch = ir.Function(
            self.module,
            ir.FunctionType(ir.VoidType(), [PTR, I32, I32, I32]),
            "llvm.prefetch.p0",
        )
        self.zeros = ir.GlobalVariable(self.module, ir.ArrayType(self.vector, 2), "zeros")
        self.zeros.linkage, self.zeros.global_constant = "internal", True
        self.zeros.initializer = ir.Constant(self.zeros.value_type, None)
        self.blocks = [self.block(rows) for rows in range(1, registers.rows + 1)]
        self.transpose()
        self.work()

    def declare(self) -> None:
        """Declare the instruction that multiplies and adds."""
        self.fma = ir.Function(
            self.module,
            ir.FunctionType(self.vector, [self.vector] * 3),
            f"llvm.fma.v{self.lanes}f32",
        )

    def block(self, rows: int) -> ir.Function:
        """Return a function that multiplies `rows` rows with `lines` lines of a panel.

        It sets `out` to `start` + products + `addend`, and prefetches `step` bytes per line at
        `ahead`.
        """
        types = [
            PTR,
            I64,
            PTR,
            PTR,
            I64,
            PTR,
            I64,
            PTR,
            I64,
            PTR,
            I64,
            I64,
        ]
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), types), f"rows{rows}")
        function.linkage = "internal"
        function.attributes.add("noinline")
        (
            transposed,
            count,
            panel,
            ahead,
            step,
            start,
            start_stride,
            addend,
            addend_stride,
            out,
            out_stride,
            lines,
        ) = function.args
        at = ir.IRBuilder(function.append_basic_block())
        places = [(row, half) for row in range(rows) for half in (0, 1)]

        def place(base: ir.Value, stride: ir.Value, row: int, half: int) -> ir.Value:
            return element_ptr(
                at, base, F32, at.add(at.mul(stride, I64(row)), I64(half * self.lanes))
            )

        sums = [
            at.load(place(start, start_stride, *where), typ=self.vector, align=4)
            for where in places
        ]
        with loop(at, lines, sums) as (line, sums):
            for offset in range(0, self.line, CACHE_LINE):
                at.call(
                    self.prefetch,
                    [
                        element_ptr(at, ahead, I8, at.add(at.mul(line, step), I64(offset))),
                        I32(0),
                        I32(2),
                        I32(1),
                    ],
                )
            weights = self.weights(at, element_ptr(at, panel, I8, at.mul(line, I64(self.line))))
            numbers = element_ptr(at, transposed, F32, at.mul(line, count))
            for index, (row, half) in enumerate(places):
                number = self.broadcast(at, element_ptr(at, numbers, F32, I64(row)))
                sums[index] = self.multiply_add(at, weights[half], number, sums[index])
        for total, where in zip(sums, places, strict=True):
            more = at.load(place(addend, addend_stride, *where), typ=self.vector, align=4)
            at.store(at.fadd(total, more), place(out, out_stride, *where), align=4)
        at.ret_void()
        return function

    def multiply_add(
        self, at: ir.IRBuilder, weights: ir.Value, number: ir.Value, total: ir.Value
    ) -> ir.Value:
        return at.call(self.fma, [weights, number, total])

    def weights(self, at: ir.IRBuilder, line: ir.Value) -> list[ir.Value]:
        """Return the two float vectors of a line.

        In bfloat16 they are the lower and upper halves of 32-bit words: the upper halves of floats.
        """
        if self.dtype == torch.bfloat16:
            words = ir.VectorType(I32, self.lanes)
            both = at.load(line, typ=words, align=4)
            lower, upper = (
                at.shl(both, words([16] * self.lanes)),
                at.and_(both, words([0xFFFF0000] * self.lanes)),
            )
            return [at.bitcast(lower, self.vector), at.bitcast(upper, self.vector)]
        stored = ir.VectorType(ir.HalfType() if self.dtype == torch.float16 else F32, self.lanes)
        halves = [
            at.load(element_ptr(at, line, stored, I64(half)), typ=stored, align=2)
            for half in (0, 1)
        ]
        return (
            [at.fpext(half, self.vector) for half in halves]
            if self.dtype == torch.float16
            else halves
        )

    def broadcast(self, at: ir.IRBuilder, address: ir.Value) -> ir.Value:
        """Return a vector of the row's element at `address`."""
        return self.repeat(at, at.load(address, typ=F32, align=4))

    def repeat(self, at: ir.IRBuilder, number: ir.Value) -> ir.Value:
        nothing = ir.Constant(ir.VectorType(number.type, self.lanes), ir.Undefined)
        return at.shuffle_vector(
            at.insert_element(nothing, number, I32(0)),
            nothing,
            ir.VectorType(I32, self.lanes)([0] * self.lanes),
        )

    def transpose(self) -> None:
        """Emit a function that writes the rows' first elements side by side, then the second ones,
        etc.
        """
        at, args = self.entry("transpose")
        with loop(at, ceil_div(at, args["inner"], TRANSPOSE_TILE)) as (tile, _):
            first = at.mul(tile, I64(TRANSPOSE_TILE))
            left = at.sub(args["inner"], first)
            length = at.select(
                at.icmp_unsigned("<", left, I64(TRANSPOSE_TILE)), left, I64(TRANSPOSE_TILE)
            )
            with loop(at, args["count"]) as (row, _):
                source = element_ptr(
                    at, args["rows"], F32, at.add(at.mul(row, args["inner"]), first)
                )
                goal = element_ptr(
                    at, args["transposed"], F32, at.add(at.mul(first, args["count"]), row)
                )
                with loop(at, length) as (index, _):
                    number = at.load(element_ptr(at, source, F32, index), typ=F32, align=4)
                    at.store(
                        number, element_ptr(at, goal, F32, at.mul(index, args["count"])), align=4
                    )
        at.ret_void()

    def work(self) -> None:
        """Emit a function in which threads take shares until none is left."""
        at, args = self.entry("work")
        with each_share(at, args["work_items"]) as share:
            first, panels = even_share(at, args["panels"], share, args["work_items"])
            with repeat(at, panels) as (index, _):
                self.panel(at, args, at.add(first, index))
        at.ret_void()

    def panel(self, at: ir.IRBuilder, args: Mapping[str, ir.Value], panel: ir.Value) -> None:
        """Emit the product of a panel with all rows, piece by piece, in blocks of nearly equal
        size.

        Each block prefetches its part of the next piece.
        """
        column = at.mul(panel, I64(2 * self.lanes))
        blocks, pieces = (
            ceil_div(at, args["count"], len(self.blocks)),
            ceil_div(at, args["inner"], LINES_PER_PASS),
        )
        step = at.udiv(I64(self.line), blocks)
        with loop(at, pieces) as (piece, _):
            line, lines = even_share(at, args["inner"], piece, pieces)
            here = element_ptr(
                at,
                args["matrix"],
                I8,
                at.mul(at.add(at.mul(panel, args["inner"]), line), I64(self.line)),
            )
            beyond = element_ptr(at, here, I8, at.mul(lines, I64(self.line)))
            transposed = element_ptr(at, args["transposed"], F32, at.mul(line, args["count"]))
            begun = at.icmp_unsigned(">", piece, I64(0))
            ends = at.icmp_unsigned("==", at.add(piece, I64(1)), pieces)
            with loop(at, blocks) as (block, _):
                row, rows = even_share(at, args["count"], block, blocks)
                addend = element_ptr(
                    at, args["addend"], F32, at.add(at.mul(row, args["addend_stride"]), column)
                )
                out = element_ptr(
                    at, args["out"], F32, at.add(at.mul(row, args["out_stride"]), column)
                )
                block_args = [
                    element_ptr(at, transposed, F32, row),
                    args["count"],
                    here,
                    element_ptr(at, beyond, I8, at.mul(at.mul(block, lines), step)),
                    step,
                    at.select(begun, out, self.zeros),
                    at.select(begun, args["out_stride"], I64(0)),
                    at.select(ends, addend, self.zeros),
                    at.select(ends, args["addend_stride"], I64(0)),
                    out,
                    args["out_stride"],
                    lines,
                ]
                self.call_block(at, rows, block_args)

    def call_block(self, at: ir.IRBuilder, rows: ir.Value, arguments: Sequence[ir.Value]) -> None:
        """Emit a call of the block function for `rows` rows."""
        after = at.append_basic_block()
        switch = at.switch(rows, after)
        for number, function in enumerate(self.blocks, 1):
            case = at.append_basic_block()
            switch.add_case(I64(number), case)
            at.position_at_end(case)
            at.call(function, arguments)
            at.branch(after)
        at.position_at_end(after)

    def entry(self, name: str) -> tuple[ir.IRBuilder, dict[str, ir.Value]]:
        """Begin a function of Arguments; return its builder and the values of the fields."""
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [PTR]), name)
        at = ir.IRBuilder(function.append_basic_block())
        addresses = ("rows", "transposed", "matrix", "addend", "out")
        fields = [field[0] for field in Arguments._fields_]
        return at, {
            field: at.load(
                element_ptr(at, function.args[0], I64, I64(index)),
                typ=PTR if field in addresses else I64,
                align=8,
            )
            for index, field in enumerate(fields)
        }


@contextmanager
def loop(
    at: ir.IRBuilder, count: ir.Value, values: Sequence[ir.Value] = ()
) -> Iterator[tuple[ir.Value, list[ir.Value]]]:
    """Repeat the body `count` times, at least once.

    Yields the number of the iteration and the carried `values`; the body replaces the values in the
    list.
    """
    before, body, after = at.block, at.append_basic_block(), at.append_basic_block()
    at.branch(body)
    at.position_at_end(body)
    entering = [I64(0), *values]
    phis = [at.phi(value.type) for value in entering]
    becoming = phis[1:]
    yield phis[0], becoming
    leaving = [at.add(phis[0], I64(1)), *becoming]
    for phi, entered, left in zip(phis, entering, leaving, strict=True):
        phi.add_incoming(entered, before)
        phi.add_incoming(left, at.block)
    at.cbranch(at.icmp_unsigned("<", leaving[0], count), body, after)
    at.position_at_end(after)


@contextmanager
def repeat(at: ir.IRBuilder, count: ir.Value) -> Iterator[tuple[ir.Value, list[ir.Value]]]:
    """Repeat the body `count` times, which may be 0. Yields as `loop` does, without values."""
    with at.if_then(at.icmp_unsigned(">", count, I64(0))), loop(at, count) as found:
        yield found


@contextmanager
def each_share(at: ir.IRBuilder, shares: ir.Value) -> Iterator[ir.Value]:
    """Repeat the body for the shares that this thread takes, until none is left.

    Yields the number of a share. The first field of the function's arguments counts them.
    """
    take, work, done = (at.append_basic_block(name) for name in ("take", "work", "done"))
    at.branch(take)
    at.position_at_end(take)
    share = at.atomic_rmw("add", at.function.args[0], I64(1), "monotonic")
    at.cbranch(at.icmp_unsigned("<", share, shares), work, done)
    at.position_at_end(work)
    yield share
    at.branch(take)
    at.position_at_end(done)


def element_ptr(at: ir.IRBuilder, base: ir.Value, unit: ir.Type, count: ir.Value) -> ir.Value:
    """Return the address `count` units after `base`."""
    return at.gep(base, [count], source_etype=unit)


def ceil_div(at: ir.IRBuilder, count: ir.Value, size: int) -> ir.Value:
    """Return count / size, rounded up."""
    return at.udiv(at.add(count, I64(size - 1)), I64(size))


def even_share(
    at: ir.IRBuilder, count: ir.Value, index: ir.Value, parts: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Return start and length of share `index` of `parts` nearly equal ones."""
    first = at.udiv(at.mul(count, index), parts)
    return first, at.sub(at.udiv(at.mul(count, at.add(index, I64(1))), parts), first)
