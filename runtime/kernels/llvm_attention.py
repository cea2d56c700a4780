"""Generates LLVM IR for attention of the rows of one text over its cache.

A query is a row and one of its heads. The queries that share a head of keys lie side by side in a
vector, so a key or value is broadcast to all of them, and no sum runs across a vector. Each sum
adds the slots in order, and hidden slots add nothing. So a row's result depends bit for bit on its
query and on the keys and values that it sees, in their order: not on the other rows, on hidden
slots between, or on the number of threads.

Keys and values are copied, as float32, in blocks that stay in the first-level cache: the products
read eight slots at once, which the processor does not fetch ahead from memory.
"""

import ctypes
from collections.abc import Callable, Mapping

import torch
from llvmlite import ir

from runtime.kernels.llvm_ir import (
    F32,
    I8,
    I16,
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
from runtime.kernels.llvm_math import VectorProgram

BLOCK_SLOTS = 32  # widened at a time
CHAINS = 8  # sums computed at a time: latency of an FMA x FMAs per cycle
TILE = 16  # elements of a value summed at a time, one register each
HALF = ir.HalfType()


class AttentionArguments(ctypes.Structure):
    """Arguments of `attend`. Strides are in elements; a block is a vector of queries."""

    _fields_ = [
        ("next", ctypes.c_int64),
        ("queries", ctypes.c_int64),  # float32 (rows, heads, dim)
        ("query_stride", ctypes.c_int64),  # of a row
        ("keys", ctypes.c_int64),  # (kv heads, slots, dim)
        ("values", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),  # of keys and values
        ("mask", ctypes.c_int64),  # float32 (slots - first, queries): 0, or negative for hidden
        ("mask_stride", ctypes.c_int64),
        ("first", ctypes.c_int64),  # slots before it are visible to all rows
        ("ends", ctypes.c_int64),  # int64 (blocks,): a block sees no slot from there on
        ("out", ctypes.c_int64),  # float32 (rows, heads, dim)
        ("out_stride", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("group", ctypes.c_int64),  # heads that share keys
        ("blocks", ctypes.c_int64),
        ("scratch", ctypes.c_int64),  # see scratch_floats, for each work item
        ("scratch_stride", ctypes.c_int64),
        ("work_items", ctypes.c_int64),
    ]


def scratch_floats(lanes: int, dim: int, slots: int) -> int:
    """Return the floats of a work item's queries, sums, widened block and weights of slots."""
    return lanes * (2 * dim + slots) + BLOCK_SLOTS * dim


class AttentionProgram(VectorProgram):
    """The IR module, with the function `attend`, for keys and values of `dtype` and size `dim`.

    The pointers of AttentionArguments need no alignment beyond that of their elements.
    """

    def __init__(self, dtype: torch.dtype, lanes: int, dim: int, scale: float) -> None:
        super().__init__(lanes)
        self.dtype, self.dim, self.scale = dtype, dim, scale
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
        """Emit the attention of one block of queries over one head of keys."""
        head, block = at.udiv(item, args["blocks"]), at.urem(item, args["blocks"])
        size = self.lanes * self.dim
        queries, sums = scratch, element_ptr(at, scratch, F32, I64(size))
        wide = element_ptr(at, scratch, F32, I64(2 * size))
        weights = element_ptr(at, wide, F32, I64(BLOCK_SLOTS * self.dim))
        start = at.mul(head, args["head_stride"])
        end = at.load(element_ptr(at, args["ends"], I64, block), typ=I64, align=8)
        self.each_query(at, args, head, block, queries, gather=True)
        self.scores(at, self.address(at, args["keys"], start), end, queries, wide, weights)
        self.hide(at, args, block, end, weights)
        total = self.exponentials(at, end, weights)
        self.weigh(at, self.address(at, args["values"], start), end, wide, weights, sums)
        with loop(at, I64(self.dim)) as (place, _):
            here = self.lane_ptr(at, sums, place)
            self.put(at, at.fdiv(self.get(at, here), total), here)
        self.each_query(at, args, head, block, sums, gather=False)

    def each_query(
        self,
        at: ir.IRBuilder,
        args: Mapping[str, ir.Value],
        head: ir.Value,
        block: ir.Value,
        vectors: ir.Value,
        gather: bool,
    ) -> None:
        """Emit copies of the queries into vectors, scaled, or of the vectors to the results.

        Lanes without a query repeat the last one, and write its result again.
        """
        last = at.sub(at.mul(args["rows"], args["group"]), I64(1))
        with loop(at, I64(self.lanes)) as (lane, _):
            query = at.add(at.mul(block, I64(self.lanes)), lane)
            query = at.select(at.icmp_unsigned("<", query, last), query, last)
            row, within = at.udiv(query, args["group"]), at.urem(query, args["group"])
            place = at.mul(at.add(at.mul(head, args["group"]), within), I64(self.dim))
            base, stride = ("queries", "query_stride") if gather else ("out", "out_stride")
            dense = element_ptr(at, args[base], F32, at.add(at.mul(row, args[stride]), place))
            with loop(at, I64(self.dim)) as (index, _):
                one = element_ptr(at, dense, F32, index)
                strided = element_ptr(
                    at, vectors, F32, at.add(at.mul(index, I64(self.lanes)), lane)
                )
                if gather:
                    scaled = at.fmul(at.load(one, typ=F32, align=4), F32(self.scale))
                    at.store(scaled, strided, align=4)
                else:
                    at.store(at.load(strided, typ=F32, align=4), one, align=4)

    def scores(
        self,
        at: ir.IRBuilder,
        keys: ir.Value,
        end: ir.Value,
        queries: ir.Value,
        wide: ir.Value,
        weights: ir.Value,
    ) -> None:
        """Emit `weights` = products of all slots' keys with the queries."""

        def products(first: ir.Value, slots: int, block: ir.Value, within: ir.Value) -> None:
            base = element_ptr(at, block, F32, at.mul(within, I64(self.dim)))
            zeros = [ir.Constant(self.vector, None)] * slots
            with loop(at, I64(self.dim), zeros) as (place, sums):
                query = self.get(at, self.lane_ptr(at, queries, place))
                for slot in range(slots):
                    key = element_ptr(at, base, F32, at.add(place, I64(slot * self.dim)))
                    sums[slot] = at.call(self.fma, [query, self.broadcast(at, key), sums[slot]])
            for slot, total in enumerate(sums):
                goal = at.add(at.add(first, within), I64(slot))
                self.put(at, total, self.lane_ptr(at, weights, goal))

        def whole(first: ir.Value, count: ir.Value, block: ir.Value) -> None:
            chains = at.udiv(count, I64(CHAINS))
            with repeat(at, chains) as (index, _):
                products(first, CHAINS, block, at.mul(index, I64(CHAINS)))
            done = at.mul(chains, I64(CHAINS))
            with repeat(at, at.sub(count, done)) as (index, _):
                products(first, 1, block, at.add(done, index))

        self.each_block(at, keys, end, wide, whole)

    def hide(
        self,
        at: ir.IRBuilder,
        args: Mapping[str, ir.Value],
        block: ir.Value,
        end: ir.Value,
        weights: ir.Value,
    ) -> None:
        """Emit that hidden slots get the score -inf, whatever their keys are."""
        begins = at.select(at.icmp_unsigned("<", args["first"], end), args["first"], end)
        column = at.mul(block, I64(self.lanes))
        with repeat(at, at.sub(end, begins)) as (index, _):
            place = at.add(at.mul(index, args["mask_stride"]), column)
            mask = self.get(at, element_ptr(at, args["mask"], F32, place))
            here = self.lane_ptr(at, weights, at.add(begins, index))
            hidden = at.fcmp_ordered("<", mask, self.vector_of(0.0))
            self.put(at, at.select(hidden, self.vector_of(-float("inf")), self.get(at, here)), here)

    def exponentials(self, at: ir.IRBuilder, end: ir.Value, weights: ir.Value) -> ir.Value:
        """Emit `weights` = exp(weights - their maximum); return their sum."""
        with loop(at, end, [self.vector_of(-float("inf"))]) as (slot, best):
            score = self.get(at, self.lane_ptr(at, weights, slot))
            best[0] = at.select(at.fcmp_ordered(">", score, best[0]), score, best[0])
        with loop(at, end, [ir.Constant(self.vector, None)]) as (slot, total):
            here = self.lane_ptr(at, weights, slot)
            weight = self.exponential(at, at.fsub(self.get(at, here), best[0]))
            self.put(at, weight, here)
            total[0] = at.fadd(total[0], weight)
        return total[0]

    def weigh(
        self,
        at: ir.IRBuilder,
        values: ir.Value,
        end: ir.Value,
        wide: ir.Value,
        weights: ir.Value,
        sums: ir.Value,
    ) -> None:
        """Emit `sums` = the slots' values by their weights; those of weight 0 are left out."""
        with loop(at, I64(self.dim)) as (place, _):
            self.put(at, ir.Constant(self.vector, None), self.lane_ptr(at, sums, place))

        def tile(
            first: ir.Value, count: ir.Value, block: ir.Value, start: ir.Value, size: int
        ) -> None:
            places = [self.lane_ptr(at, sums, at.add(start, I64(one))) for one in range(size)]
            with loop(at, count, [self.get(at, place) for place in places]) as (slot, totals):
                weight = self.get(at, self.lane_ptr(at, weights, at.add(first, slot)))
                counts = at.fcmp_ordered(">", weight, self.vector_of(0.0))
                row = element_ptr(at, block, F32, at.add(at.mul(slot, I64(self.dim)), start))
                for one in range(size):
                    value = self.broadcast(at, element_ptr(at, row, F32, I64(one)))
                    more = at.call(self.fma, [weight, value, totals[one]])
                    totals[one] = at.select(counts, more, totals[one])
            for place, total in zip(places, totals, strict=True):
                self.put(at, total, place)

        def whole(first: ir.Value, count: ir.Value, block: ir.Value) -> None:
            tiles, rest = divmod(self.dim, TILE)
            if tiles:
                with loop(at, I64(tiles)) as (index, _):
                    tile(first, count, block, at.mul(index, I64(TILE)), TILE)
            if rest:
                tile(first, count, block, I64(tiles * TILE), rest)

        self.each_block(at, values, end, wide, whole)

    def each_block(
        self,
        at: ir.IRBuilder,
        base: ir.Value,
        end: ir.Value,
        wide: ir.Value,
        body: Callable[[ir.Value, ir.Value, ir.Value], None],
    ) -> None:
        """Emit `body` for each block of slots: its first slot, their number, and float32 rows."""
        with loop(at, ceil_div(at, end, BLOCK_SLOTS)) as (index, _):
            first = at.mul(index, I64(BLOCK_SLOTS))
            left = at.sub(end, first)
            whole = at.icmp_unsigned("<", left, I64(BLOCK_SLOTS))
            count = at.select(whole, left, I64(BLOCK_SLOTS))
            source = self.address(at, base, at.mul(first, I64(self.dim)))
            self.widen(at, source, at.mul(count, I64(self.dim)), wide)
            body(first, count, wide)

    def widen(self, at: ir.IRBuilder, source: ir.Value, count: ir.Value, goal: ir.Value) -> None:
        """Emit a copy of `count` numbers as float32."""
        vectors = at.udiv(count, I64(self.lanes))
        with repeat(at, vectors) as (index, _):
            place = at.mul(index, I64(self.lanes))
            self.widen_one(at, source, goal, place, self.lanes)
        done = at.mul(vectors, I64(self.lanes))
        with repeat(at, at.sub(count, done)) as (index, _):
            self.widen_one(at, source, goal, at.add(done, index), 1)

    def widen_one(
        self, at: ir.IRBuilder, source: ir.Value, goal: ir.Value, place: ir.Value, lanes: int
    ) -> None:
        address = self.address(at, source, place)
        if self.dtype == torch.float32:
            found = at.load(address, typ=ir.VectorType(F32, lanes), align=4)
        elif self.dtype == torch.float16:
            stored = at.load(address, typ=ir.VectorType(HALF, lanes), align=2)
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
