"""The code of products of a few rows with a matrix, before it is translated for a processor.

A matrix lies in panels. A panel is two vectors of outputs wide and as long as a row; its lines, one for each element of a row, follow each
other in memory, so that all of the matrix is one stream. A block of rows keeps its sums in registers while a panel passes by: a line is
read once, widened to float32 there, and multiplied with one number of each row. So a block of rows costs little more than reading the
matrix, and weights of 16 bits cost half of those of 32.

Each sum takes up its products one after the other, each added with one rounding: what a row becomes depends on nothing but the row,
whatever rows are beside it and on however many threads.
"""

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from llvmlite import ir

WIDE = ir.IntType(64)
INT = ir.IntType(32)
BYTE = ir.IntType(8)
FLOAT = ir.FloatType()
POINTER = ir.PointerType()

PIECE = 512  # lines of a panel that all rows are multiplied with before the next ones: with their rows they stay in the cache
CACHE_LINE = 64  # bytes
TILE = 16  # elements of a row that are turned at once: a line of the cache


class Arguments(ctypes.Structure):
    """Of `turn` and `share`, which are called one after the other. Addresses; strides in floats."""

    _fields_ = [
        ("rows", ctypes.c_int64),  # (count, inner), dense
        ("turned", ctypes.c_int64),  # room for (inner, count)
        ("count", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("matrix", ctypes.c_int64),
        ("panels", ctypes.c_int64),
        (
            "onto",
            ctypes.c_int64,
        ),  # what is added to the sums: (count, all outputs of the panels), of stride 0 where it is one for all rows
        ("onto_stride", ctypes.c_int64),
        ("out", ctypes.c_int64),  # (count, all outputs of the panels)
        ("out_stride", ctypes.c_int64),
        ("shares", ctypes.c_int64),  # of the panels, for as many threads
        ("next", ctypes.c_int64),  # share to be done
    ]


@dataclass(frozen=True, slots=True)
class Registers:
    """Floats that one holds, and the rows of a block: two sums each, beside a line of the matrix and what widens it."""

    lanes: int
    rows: int


class Program:
    """The code before translation: `module`, with the functions `turn` and `share`."""

    def __init__(self, kind: torch.dtype, registers: Registers) -> None:
        self.module = ir.Module()
        self.kind, self.lanes, self.line = (
            kind,
            registers.lanes,
            2 * registers.lanes * kind.itemsize,
        )
        self.vector = ir.VectorType(FLOAT, self.lanes)
        self.fma = ir.Function(
            self.module,
            ir.FunctionType(self.vector, [self.vector] * 3),
            f"llvm.fma.v{self.lanes}f32",
        )
        self.prefetch = ir.Function(
            self.module,
            ir.FunctionType(ir.VoidType(), [POINTER, INT, INT, INT]),
            "llvm.prefetch.p0",
        )
        self.zeros = ir.GlobalVariable(self.module, ir.ArrayType(self.vector, 2), "zeros")
        self.zeros.linkage, self.zeros.global_constant = "internal", True
        self.zeros.initializer = ir.Constant(self.zeros.value_type, None)
        self.blocks = [self.block(rows) for rows in range(1, registers.rows + 1)]
        self.turn()
        self.share()

    def block(self, rows: int) -> ir.Function:
        """`rows` rows with `lines` lines of a panel: `out` becomes `start`, and the products, and `onto`.

        What is at `ahead`, and from line to line `step` bytes on, will be wanted soon.
        """
        kinds = [
            POINTER,
            WIDE,
            POINTER,
            POINTER,
            WIDE,
            POINTER,
            WIDE,
            POINTER,
            WIDE,
            POINTER,
            WIDE,
            WIDE,
        ]
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), kinds), f"rows{rows}")
        function.linkage = "internal"
        function.attributes.add("noinline")
        (
            turned,
            count,
            panel,
            ahead,
            step,
            start,
            start_stride,
            onto,
            onto_stride,
            out,
            out_stride,
            lines,
        ) = function.args
        at = ir.IRBuilder(function.append_basic_block())
        places = [(row, half) for row in range(rows) for half in (0, 1)]

        def place(base: ir.Value, stride: ir.Value, row: int, half: int) -> ir.Value:
            return move(at, base, FLOAT, at.add(at.mul(stride, WIDE(row)), WIDE(half * self.lanes)))

        sums = [
            at.load(place(start, start_stride, *where), typ=self.vector, align=4)
            for where in places
        ]
        with loop(at, lines, sums) as (line, sums):
            for offset in range(0, self.line, CACHE_LINE):
                at.call(
                    self.prefetch,
                    [
                        move(at, ahead, BYTE, at.add(at.mul(line, step), WIDE(offset))),
                        INT(0),
                        INT(2),
                        INT(1),
                    ],
                )
            weights = self.widened(at, move(at, panel, BYTE, at.mul(line, WIDE(self.line))))
            numbers = move(at, turned, FLOAT, at.mul(line, count))
            for index, (row, half) in enumerate(places):
                number = self.spread(
                    at, at.load(move(at, numbers, FLOAT, WIDE(row)), typ=FLOAT, align=4)
                )
                sums[index] = at.call(self.fma, [weights[half], number, sums[index]])
        for total, where in zip(sums, places, strict=True):
            more = at.load(place(onto, onto_stride, *where), typ=self.vector, align=4)
            at.store(at.fadd(total, more), place(out, out_stride, *where), align=4)
        at.ret_void()
        return function

    def widened(self, at: ir.IRBuilder, line: ir.Value) -> list[ir.Value]:
        """The two vectors of a line. In bfloat16 they are the lower and the upper halves of 32-bit words: the upper halves of floats."""
        if self.kind == torch.bfloat16:
            words = ir.VectorType(INT, self.lanes)
            both = at.load(line, typ=words, align=4)
            lower, upper = (
                at.shl(both, words([16] * self.lanes)),
                at.and_(both, words([0xFFFF0000] * self.lanes)),
            )
            return [at.bitcast(lower, self.vector), at.bitcast(upper, self.vector)]
        stored = ir.VectorType(ir.HalfType() if self.kind == torch.float16 else FLOAT, self.lanes)
        halves = [
            at.load(move(at, line, stored, WIDE(half)), typ=stored, align=2) for half in (0, 1)
        ]
        return (
            [at.fpext(half, self.vector) for half in halves]
            if self.kind == torch.float16
            else halves
        )

    def spread(self, at: ir.IRBuilder, number: ir.Value) -> ir.Value:
        nothing = ir.Constant(self.vector, ir.Undefined)
        return at.shuffle_vector(
            at.insert_element(nothing, number, INT(0)),
            nothing,
            ir.VectorType(INT, self.lanes)([0] * self.lanes),
        )

    def turn(self) -> None:
        """Writes the rows' first elements side by side, then their second ones, and so on."""
        at, given = self.entry("turn")
        with loop(at, ceiling(at, given["inner"], TILE)) as (tile, _):
            first = at.mul(tile, WIDE(TILE))
            left = at.sub(given["inner"], first)
            length = at.select(at.icmp_unsigned("<", left, WIDE(TILE)), left, WIDE(TILE))
            with loop(at, given["count"]) as (row, _):
                source = move(at, given["rows"], FLOAT, at.add(at.mul(row, given["inner"]), first))
                goal = move(at, given["turned"], FLOAT, at.add(at.mul(first, given["count"]), row))
                with loop(at, length) as (index, _):
                    number = at.load(move(at, source, FLOAT, index), typ=FLOAT, align=4)
                    at.store(number, move(at, goal, FLOAT, at.mul(index, given["count"])), align=4)
        at.ret_void()

    def share(self) -> None:
        """Does shares until none is left, whichever threads come."""
        at, given = self.entry("share")
        take, work, done = (at.append_basic_block(name) for name in ("take", "work", "done"))
        at.branch(take)
        at.position_at_end(take)
        number = at.atomic_rmw(
            "add",
            move(at, at.function.args[0], WIDE, WIDE(len(Arguments._fields_) - 1)),
            WIDE(1),
            "monotonic",
        )
        at.cbranch(at.icmp_unsigned("<", number, given["shares"]), work, done)
        at.position_at_end(work)
        first, panels = part(at, given["panels"], number, given["shares"])
        with at.if_then(at.icmp_unsigned(">", panels, WIDE(0))), loop(at, panels) as (index, _):
            self.panel(at, given, at.add(first, index))
        at.branch(take)
        at.position_at_end(done)
        at.ret_void()

    def panel(self, at: ir.IRBuilder, given: Mapping[str, ir.Value], panel: ir.Value) -> None:
        """A panel piece by piece, with all rows, in blocks that are as equal as can be; each block fetches its part of the next piece."""
        column = at.mul(panel, WIDE(2 * self.lanes))
        blocks, pieces = (
            ceiling(at, given["count"], len(self.blocks)),
            ceiling(at, given["inner"], PIECE),
        )
        step = at.udiv(WIDE(self.line), blocks)
        with loop(at, pieces) as (piece, _):
            line, lines = part(at, given["inner"], piece, pieces)
            here = move(
                at,
                given["matrix"],
                BYTE,
                at.mul(at.add(at.mul(panel, given["inner"]), line), WIDE(self.line)),
            )
            beyond = move(at, here, BYTE, at.mul(lines, WIDE(self.line)))
            turned = move(at, given["turned"], FLOAT, at.mul(line, given["count"]))
            begun = at.icmp_unsigned(">", piece, WIDE(0))
            ends = at.icmp_unsigned("==", at.add(piece, WIDE(1)), pieces)
            with loop(at, blocks) as (block, _):
                row, rows = part(at, given["count"], block, blocks)
                onto = move(
                    at, given["onto"], FLOAT, at.add(at.mul(row, given["onto_stride"]), column)
                )
                out = move(
                    at, given["out"], FLOAT, at.add(at.mul(row, given["out_stride"]), column)
                )
                given_to_block = [
                    move(at, turned, FLOAT, row),
                    given["count"],
                    here,
                    move(at, beyond, BYTE, at.mul(at.mul(block, lines), step)),
                    step,
                    at.select(begun, out, self.zeros),
                    at.select(begun, given["out_stride"], WIDE(0)),
                    at.select(ends, onto, self.zeros),
                    at.select(ends, given["onto_stride"], WIDE(0)),
                    out,
                    given["out_stride"],
                    lines,
                ]
                self.choose(at, rows, given_to_block)

    def choose(self, at: ir.IRBuilder, rows: ir.Value, arguments: Sequence[ir.Value]) -> None:
        """Calls the block of so many rows."""
        after = at.append_basic_block()
        switch = at.switch(rows, after)
        for number, function in enumerate(self.blocks, 1):
            case = at.append_basic_block()
            switch.add_case(WIDE(number), case)
            at.position_at_end(case)
            at.call(function, arguments)
            at.branch(after)
        at.position_at_end(after)

    def entry(self, name: str) -> tuple[ir.IRBuilder, dict[str, ir.Value]]:
        """A function of Arguments: its beginning, and what they say."""
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [POINTER]), name)
        at = ir.IRBuilder(function.append_basic_block())
        addresses = ("rows", "turned", "matrix", "onto", "out")
        fields = [field[0] for field in Arguments._fields_]
        return at, {
            field: at.load(
                move(at, function.args[0], WIDE, WIDE(index)),
                typ=POINTER if field in addresses else WIDE,
                align=8,
            )
            for index, field in enumerate(fields)
        }


@contextmanager
def loop(
    at: ir.IRBuilder, count: ir.Value, values: Sequence[ir.Value] = ()
) -> Iterator[tuple[ir.Value, list[ir.Value]]]:
    """What is built within is done `count` times, at least once, with its number and `values`; the list is left as the values become."""
    before, body, after = at.block, at.append_basic_block(), at.append_basic_block()
    at.branch(body)
    at.position_at_end(body)
    entering = [WIDE(0), *values]
    phis = [at.phi(value.type) for value in entering]
    becoming = phis[1:]
    yield phis[0], becoming
    leaving = [at.add(phis[0], WIDE(1)), *becoming]
    for phi, entered, left in zip(phis, entering, leaving, strict=True):
        phi.add_incoming(entered, before)
        phi.add_incoming(left, at.block)
    at.cbranch(at.icmp_unsigned("<", leaving[0], count), body, after)
    at.position_at_end(after)


def move(at: ir.IRBuilder, base: ir.Value, unit: ir.Type, count: ir.Value) -> ir.Value:
    """The address `count` units behind `base`."""
    return at.gep(base, [count], source_etype=unit)


def ceiling(at: ir.IRBuilder, count: ir.Value, size: int) -> ir.Value:
    """How many parts of at most `size` there are."""
    return at.udiv(at.add(count, WIDE(size - 1)), WIDE(size))


def part(
    at: ir.IRBuilder, count: ir.Value, index: ir.Value, parts: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Where the part `index` of `parts` equal ones begins, and how long it is."""
    first = at.udiv(at.mul(count, index), parts)
    return first, at.sub(at.udiv(at.mul(count, at.add(index, WIDE(1))), parts), first)
