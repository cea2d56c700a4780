"""Generates LLVM IR for attention of the rows of one text over its cache.

A query is a row and one of its heads. Its products with keys run along the numbers of a head, and
so do the sums of its values: a vector holds numbers of one query, so few queries leave no lane
idle. A score adds 16 partial sums in an order that is the same for every slot, and a sum of values
adds the slots in order; hidden slots add nothing. So a row's result depends bit for bit on its
query and on the keys and values that it sees, in their order: not on the other rows, on hidden
slots between, on the number of threads, or on the length of the processor's registers.

Keys and values are copied, as float32, in blocks that stay in the first-level cache, once for all
queries that share them.
"""

import ctypes
from collections.abc import Mapping, Sequence

import torch
from llvmlite import ir

from runtime.kernels.llvm_ir import (
    F32,
    I32,
    I64,
    PTR,
    ceil_div,
    each_share,
    element_ptr,
    even_share,
    loop,
    repeat,
)
from runtime.kernels.llvm_widen import BLOCK_SLOTS, LANES, WideProgram, padded

TILE_QUERIES = 4  # whose values are summed at a time: latency of an FMA x FMAs per cycle / vectors
TILE_VECTORS = 4  # of each of these queries, one register each


class AttentionArguments(ctypes.Structure):
    """Arguments of `attend`. Strides are in elements; a block is a share of the rows."""

    _fields_ = [
        ("next", ctypes.c_int64),
        ("queries", ctypes.c_int64),  # float32 (rows, heads, dim)
        ("query_stride", ctypes.c_int64),  # of a row
        ("keys", ctypes.c_int64),  # (kv heads, slots, dim)
        ("values", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),  # of keys and values
        ("mask", ctypes.c_int64),  # float32 (rows, slots - first): 0, or negative for hidden
        ("mask_stride", ctypes.c_int64),  # with room for a vector after the last slot
        ("first", ctypes.c_int64),  # slots before it are visible to all rows
        ("ends", ctypes.c_int64),  # int64 (blocks,): a block sees no slot from there on
        ("out", ctypes.c_int64),  # float32 (rows, heads, dim)
        ("out_stride", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("group", ctypes.c_int64),  # heads that share keys
        ("blocks", ctypes.c_int64),
        ("block_queries", ctypes.c_int64),  # at most, of a head of keys
        ("weight_stride", ctypes.c_int64),  # of a query: room for all slots, see weight_floats
        ("scratch", ctypes.c_int64),  # see scratch_floats, for each work item
        ("scratch_stride", ctypes.c_int64),
        ("work_items", ctypes.c_int64),
    ]


def weight_floats(slots: int) -> int:
    """Return the room for the weights of a query: vectors may begin at any slot."""
    return -(-slots // LANES) * LANES + LANES


def scratch_floats(queries: int, dim: int, slots: int) -> int:
    """Return the floats of a work item: of its queries, sums, totals, widened block and weights."""
    room = queries * (2 * padded(dim) + LANES + weight_floats(slots))
    return room + BLOCK_SLOTS * padded(dim)


class AttentionProgram(WideProgram):
    """The IR module, with the function `attend`, for keys and values of `dtype` and size `dim`.

    The pointers of AttentionArguments need no alignment beyond that of their elements.
    """

    def __init__(self, dtype: torch.dtype, dim: int, scale: float) -> None:
        super().__init__(dtype, dim)
        self.scale = scale
        self.attend()

    def attend(self) -> None:
        """Emit a function in which each work item does its share of heads x blocks."""
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [PTR]), "attend")
        at = ir.IRBuilder(function.append_basic_block())
        fields = [field[0] for field in AttentionArguments._fields_]
        addresses = ("queries", "keys", "values", "mask", "ends", "out", "scratch")
        args = {
            field: at.load(
                element_ptr(at, function.args[0], I64, I64(index)),
                typ=PTR if field in addresses else I64,
                align=8,
            )
            for index, field in enumerate(fields)
        }
        items = at.mul(args["kv_heads"], args["blocks"])
        with each_share(at, args["work_items"]) as share:
            scratch = element_ptr(at, args["scratch"], F32, at.mul(share, args["scratch_stride"]))
            first, count = even_share(at, items, share, args["work_items"])
            with repeat(at, count) as (index, _):
                self.item(at, args, at.add(first, index), scratch)
        at.ret_void()

    def item(
        self, at: ir.IRBuilder, args: Mapping[str, ir.Value], item: ir.Value, scratch: ir.Value
    ) -> None:
        """Emit the attention of one block of rows over one head of keys."""
        head, block = at.udiv(item, args["blocks"]), at.urem(item, args["blocks"])
        row, rows = even_share(at, args["rows"], block, args["blocks"])
        count, most = at.mul(rows, args["group"]), args["block_queries"]
        size = I64(padded(self.dim))
        queries = scratch
        sums = element_ptr(at, queries, F32, at.mul(most, size))
        totals = element_ptr(at, sums, F32, at.mul(most, size))
        wide = element_ptr(at, totals, F32, at.mul(most, I64(LANES)))
        weights = element_ptr(at, wide, F32, I64(BLOCK_SLOTS * padded(self.dim)))
        stride = args["weight_stride"]
        start = at.mul(head, args["head_stride"])
        keys, values = (self.address(at, args[name], start) for name in ("keys", "values"))
        end = at.load(element_ptr(at, args["ends"], I64, block), typ=I64, align=8)

        def place(query: ir.Value, name: str) -> ir.Value:
            """Return where a query of the block, or its result, lies."""
            of_row = at.add(row, at.udiv(query, args["group"]))
            of_head = at.add(at.mul(head, args["group"]), at.urem(query, args["group"]))
            line = at.mul(of_row, args["query_stride" if name == "queries" else "out_stride"])
            return element_ptr(at, args[name], F32, at.add(line, at.mul(of_head, I64(self.dim))))

        with loop(at, count) as (query, _):
            self.scale_query(
                at, place(query, "queries"), element_ptr(at, queries, F32, at.mul(query, size))
            )
        with self.each_block(at, keys, end, wide) as (first, _), loop(at, count) as (query, _):
            own = element_ptr(at, queries, F32, at.mul(query, size))
            goal = element_ptr(at, weights, F32, at.add(at.mul(query, stride), first))
            self.scores(at, own, wide, goal)
        with loop(at, count) as (query, _):
            own = element_ptr(at, weights, F32, at.mul(query, stride))
            of_row = at.mul(at.add(row, at.udiv(query, args["group"])), args["mask_stride"])
            self.hide(at, element_ptr(at, args["mask"], F32, of_row), args["first"], end, own)
            self.exponentials(at, end, own)
        with loop(at, at.mul(count, size)) as (index, _):
            at.store(F32(0), element_ptr(at, sums, F32, index), align=4)
        with loop(at, at.mul(count, I64(LANES))) as (index, _):
            at.store(F32(0), element_ptr(at, totals, F32, index), align=4)
        with self.each_block(at, values, end, wide) as (first, slots):
            tiles = ceil_div(at, count, TILE_QUERIES)
            with loop(at, tiles) as (tile, _):
                query, many = even_share(at, count, tile, tiles)
                pointers = (
                    element_ptr(at, weights, F32, at.add(at.mul(query, stride), first)),
                    element_ptr(at, sums, F32, at.mul(query, size)),
                    element_ptr(at, totals, F32, at.mul(query, I64(LANES))),
                )
                self.weigh(at, many, slots, wide, stride, *pointers)
        with loop(at, count) as (query, _):
            total = self.get(at, self.lane_ptr(at, totals, query))
            self.divide(
                at,
                element_ptr(at, sums, F32, at.mul(query, size)),
                total,
                place(query, "out"),
            )

    def scale_query(self, at: ir.IRBuilder, query: ir.Value, goal: ir.Value) -> None:
        """Emit a copy of a query, scaled, and padded with zeros."""
        whole, rest = divmod(self.dim, LANES)
        for index in range(whole):
            numbers = self.get(at, self.lane_ptr(at, query, I64(index)))
            scaled = at.fmul(numbers, self.vector_of(self.scale))
            self.put(at, scaled, self.lane_ptr(at, goal, I64(index)))
        if rest:
            zeros = ir.Constant(self.vector, None)
            self.put(at, zeros, self.lane_ptr(at, goal, I64(whole)))
            with loop(at, I64(rest)) as (index, _):
                one = at.add(index, I64(whole * LANES))
                number = at.load(element_ptr(at, query, F32, one), typ=F32, align=4)
                scaled = at.fmul(number, F32(self.scale))
                at.store(scaled, element_ptr(at, goal, F32, one), align=4)

    def divide(self, at: ir.IRBuilder, sums: ir.Value, total: ir.Value, out: ir.Value) -> None:
        """Emit out = sums / total."""
        whole, rest = divmod(self.dim, LANES)
        for index in range(self.vectors):
            here = self.lane_ptr(at, sums, I64(index))
            share = at.fdiv(self.get(at, here), total)
            self.put(at, share, self.lane_ptr(at, out, I64(index)) if index < whole else here)
        if rest:
            with loop(at, I64(rest)) as (index, _):
                one = at.add(index, I64(whole * LANES))
                number = at.load(element_ptr(at, sums, F32, one), typ=F32, align=4)
                at.store(number, element_ptr(at, out, F32, one), align=4)

    def scores(self, at: ir.IRBuilder, query: ir.Value, keys: ir.Value, goal: ir.Value) -> None:
        """Emit the products of a query with a block of keys."""
        with loop(at, I64(BLOCK_SLOTS // LANES)) as (part, _):
            first = at.mul(part, I64(LANES))
            base = element_ptr(at, keys, F32, at.mul(first, I64(padded(self.dim))))
            sums: list[ir.Value] = []
            for index in range(self.vectors):
                numbers = self.get(at, self.lane_ptr(at, query, I64(index)))
                for slot in range(LANES):
                    key = self.get(at, self.lane_ptr(at, base, I64(slot * self.vectors + index)))
                    if index:
                        sums[slot] = at.call(self.fma, [numbers, key, sums[slot]])
                    else:
                        sums.append(at.fmul(numbers, key))
            self.put(at, self.sum_each(at, sums), element_ptr(at, goal, F32, first))

    def sum_each(self, at: ir.IRBuilder, vectors: Sequence[ir.Value]) -> ir.Value:
        """Return the sum of each of LANES vectors: halves are added until one lane is left."""
        width = LANES
        while width > 1:
            width //= 2
            order = [
                source * LANES + lane
                for source in (0, 1)
                for begin in range(0, LANES, 2 * width)
                for lane in range(begin, begin + width)
            ]
            lower, upper = self.ints(order), self.ints([lane + width for lane in order])
            vectors = [
                at.fadd(at.shuffle_vector(one, two, lower), at.shuffle_vector(one, two, upper))
                for one, two in zip(vectors[::2], vectors[1::2], strict=True)
            ]
        return vectors[0]

    def hide(
        self,
        at: ir.IRBuilder,
        mask: ir.Value,
        first: ir.Value,
        end: ir.Value,
        weights: ir.Value,
    ) -> None:
        """Emit that hidden slots get the score -inf, whatever their keys are."""
        begins = at.select(at.icmp_unsigned("<", first, end), first, end)
        with repeat(at, ceil_div(at, at.sub(end, begins), LANES)) as (index, _):
            here = element_ptr(at, weights, F32, at.add(begins, at.mul(index, I64(LANES))))
            hides = self.get(at, self.lane_ptr(at, mask, index))
            hidden = at.fcmp_ordered("<", hides, self.vector_of(0.0))
            self.put(at, at.select(hidden, self.vector_of(-float("inf")), self.get(at, here)), here)

    def exponentials(self, at: ir.IRBuilder, end: ir.Value, weights: ir.Value) -> None:
        """Emit `weights` = exp(weights - their maximum); those from slot `end` on do not count."""
        vectors = ceil_div(at, end, LANES)
        last = at.mul(at.sub(vectors, I64(1)), I64(LANES))
        lanes = ir.VectorType(I64, LANES)(list(range(LANES)))
        counts = at.icmp_unsigned("<", lanes, splat(at, at.sub(end, last), LANES))
        here = element_ptr(at, weights, F32, last)
        self.put(at, at.select(counts, self.get(at, here), self.vector_of(-float("inf"))), here)
        with loop(at, vectors, [self.vector_of(-float("inf"))]) as (index, found):
            score = self.get(at, self.lane_ptr(at, weights, index))
            found[0] = at.select(at.fcmp_ordered(">", score, found[0]), score, found[0])
        best, width = found[0], LANES
        while width > 1:
            width //= 2
            turned = self.ints([(lane + width) % LANES for lane in range(LANES)])
            other = at.shuffle_vector(best, best, turned)
            best = at.select(at.fcmp_ordered(">", other, best), other, best)
        with loop(at, vectors) as (index, _):
            here = self.lane_ptr(at, weights, index)
            self.put(at, self.exponential(at, at.fsub(self.get(at, here), best)), here)

    def weigh(
        self,
        at: ir.IRBuilder,
        queries: ir.Value,
        slots: ir.Value,
        values: ir.Value,
        stride: ir.Value,
        weights: ir.Value,
        sums: ir.Value,
        totals: ir.Value,
    ) -> None:
        """Emit `sums` += the slots' values by their weights, `totals` += the weights, for at most
        TILE_QUERIES queries; slots of weight 0 are left out.
        """
        after = at.append_basic_block()
        switch = at.switch(queries, after)
        for count in range(1, TILE_QUERIES + 1):
            case = at.append_basic_block()
            switch.add_case(I64(count), case)
            at.position_at_end(case)
            for begin in range(0, self.vectors, TILE_VECTORS):
                tile = range(begin, min(self.vectors, begin + TILE_VECTORS))
                self.weigh_tile(at, count, tile, slots, values, stride, weights, sums, totals)
            at.branch(after)
        at.position_at_end(after)

    def weigh_tile(
        self,
        at: ir.IRBuilder,
        queries: int,
        tile: range,
        slots: ir.Value,
        values: ir.Value,
        stride: ir.Value,
        weights: ir.Value,
        sums: ir.Value,
        totals: ir.Value,
    ) -> None:
        """Emit the sums of these vectors, with the first ones the totals."""
        places = [
            [self.lane_ptr(at, sums, I64(query * self.vectors + index)) for index in tile]
            + ([] if tile.start else [self.lane_ptr(at, totals, I64(query))])
            for query in range(queries)
        ]
        width = len(places[0])
        entering = [self.get(at, place) for of_query in places for place in of_query]
        rows = [element_ptr(at, weights, F32, at.mul(stride, I64(q))) for q in range(queries)]
        with loop(at, slots, entering) as (slot, found):
            base = self.lane_ptr(at, values, at.mul(slot, I64(self.vectors)))
            numbers = [self.get(at, self.lane_ptr(at, base, I64(index))) for index in tile]
            for query, row in enumerate(rows):
                weight = element_ptr(at, row, F32, slot)
                own = slice(query * width, (query + 1) * width)
                before, old = at.block, found[own]
                # Its bits are compared: no register of vectors is needed. It is never -0.
                with at.if_then(at.icmp_unsigned("!=", at.load(weight, typ=I32, align=4), I32(0))):
                    factor = self.broadcast(at, weight)
                    new = [
                        at.call(self.fma, [factor, value, total])
                        for value, total in zip(numbers, old, strict=False)
                    ]
                    if not tile.start:
                        new.append(at.fadd(old[-1], factor))
                    inside = at.block
                for index, (one, other) in enumerate(zip(old, new, strict=True)):
                    phi = at.phi(self.vector)
                    phi.add_incoming(one, before)
                    phi.add_incoming(other, inside)
                    found[query * width + index] = phi
        for place, total in zip((p for of_query in places for p in of_query), found, strict=True):
            self.put(at, total, place)


def splat(at: ir.IRBuilder, number: ir.Value, lanes: int) -> ir.Value:
    """Return a vector of a number."""
    nothing = ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined)
    one = at.insert_element(nothing, number, I32(0))
    return at.shuffle_vector(one, nothing, ir.VectorType(I32, lanes)([0] * lanes))
