"""The layers of a LlamaPass as one list of compiled calls.

A call from Python takes microseconds, and so does a small model's product: between the products of
SmolLM2-135M such calls took a quarter of a pass. So the functions of all layers are listed once,
with their arguments, and a pass sets what differs: rows, angles, caches. The functions and their
order are those of `LlamaPass._run_layer`, and so are the results, bit for bit.

A pass of 1, 4, 8 and 16 rows of SmolLM2-135M in bfloat16 takes 8.1, 8.7, 9.8 and 11.5 ms after 64
tokens, and 8.8, 10.6, 12.7 and 16.5 ms after 700 (one core of an AMD EPYC, Zen 5, medians). Reading
its weights takes 6.9 ms; all that is between the products of one row takes 0.4 ms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from runtime.kernels.attention import Attention
from runtime.kernels.call_list import CALL, Structs, addresses, function_address, run_calls, structs
from runtime.kernels.jit import is_supported
from runtime.kernels.llvm_attention import AttentionArguments
from runtime.kernels.llvm_ir import Arguments
from runtime.kernels.llvm_rows import LANES, RowArguments
from runtime.kernels.packed_weight import MAX_ROWS, PackedWeight
from runtime.kernels.rowwise import load_row_kernels, threads_for
from runtime.models.llama_layers import HeadShape, LlamaLayer, RMSNorm


@dataclass(frozen=True, slots=True)
class CachedText:
    """The place of one text's rows, which follow those of the text before.

    planes     (2 x layers, heads, slots, dim), see TorchCache.planes
    slot       of the first row
    rows       number of rows
    attention  by layer type
    """

    planes: torch.Tensor
    slot: int
    rows: int
    attention: dict[str, Attention]


@dataclass(frozen=True, slots=True)
class Operation:
    """A function that every layer calls.

    function   its address, for all layers or for each
    arguments  of each layer
    floats     of a row: threads share the rows if that is worth it. None: a function that shares
               its work among all threads
    memory     to which the arguments point
    """

    function: Any
    arguments: Structs
    floats: int | None
    memory: tuple[torch.Tensor, ...]


class LlamaCalls:
    """Runs the layers. `can_list` says whether they can be; it is not thread-safe."""

    def __init__(self, layers: Sequence[LlamaLayer], shape: HeadShape) -> None:
        self._layers, self._shape, kernels = layers, shape, load_row_kernels()
        qkv, out, gate_up, down = (
            [packed(getattr(layer, name).product) for layer in layers]
            for name in ("qkv", "out", "gate_up", "down")
        )
        self._hidden, inner = down[0].outer, down[0].inner
        self._x, middle = buffer(down[0].width), buffer(out[0].width)
        self._qkv, self._attended = buffer(qkv[0].width), buffer(out[0].inner)
        normed, gates, gated = buffer(self._hidden), buffer(gate_up[0].width), buffer(inner)
        turned = shape.heads + shape.kv_heads
        self._rotate = self._by_rows(kernels.rotate, self._qkv, self._qkv, shape.dim, turned)
        self._before = [
            self._norm([layer.before for layer in layers], self._x, normed),
            *self._product(qkv, normed, None, self._qkv),
            *self._head_norms([layer.heads for layer in layers if layer.heads is not None]),
            self._rotate,
        ]
        self._after = [
            *self._product(out, self._attended, self._x, middle),
            self._norm([layer.after for layer in layers], middle, normed),
            *self._product(gate_up, normed, None, gates),
            self._by_rows(kernels.gate, gates, gated, inner),
            *self._product(down, gated, middle, self._x),
        ]
        self._texts: list[tuple[Structs, Structs]] = []  # arguments of writing and attention
        self._kinds = np.array([layer.kind for layer in layers])
        self._calls: dict[int, Structs] = {}  # by number of texts, (layers, calls)
        self._size = 0, 0, 0  # rows, texts and threads of the last run

    def run(
        self, layers: range, x: torch.Tensor, angles: torch.Tensor, texts: Sequence[CachedText]
    ) -> torch.Tensor:
        """Return the rows (n, d), n at most MAX_ROWS, after these layers; the next run overwrites
        them.

        x       float32 (n, d)
        angles  float32 (n, 2, 1, dim), dense: cosines and sines
        """
        rows = self._x[: len(x), : self._hidden]
        if x.data_ptr() != rows.data_ptr():
            rows.copy_(x)
        calls = self._sized(len(x), len(texts))
        self._rotate.arguments["parameters"] = angles.data_ptr()
        start = 0
        for index, text in enumerate(texts):
            place = len(self._before) + 2 * index
            self._place(text, start, calls[:, place], calls[:, place + 1], *self._texts[index])
            start += text.rows
        run_calls(calls[layers.start : layers.stop])
        return rows

    def _sized(self, rows: int, texts: int) -> Structs:
        """Return the calls (layers, calls) for so many rows and texts."""
        size = rows, texts, torch.get_num_threads()
        while len(self._texts) < texts:
            count = len(self._layers)
            self._texts.append((structs(RowArguments, count), structs(AttentionArguments, count)))
        if texts not in self._calls:
            of_texts = [
                Operation(0, arguments, None, ())
                for pair in self._texts[:texts]
                for arguments in pair
            ]
            self._calls[texts] = self._list([*self._before, *of_texts, *self._after])
        calls = self._calls[texts]
        if size != self._size:
            self._size = size
            places = [*range(len(self._before)), *range(-len(self._after), 0)]
            for place, one in zip(places, [*self._before, *self._after], strict=True):
                one.arguments["count"] = rows
                items = size[2] if one.floats is None else threads_for(rows * one.floats)
                one.arguments["work_items"] = calls["work_items"][:, place] = items
        return calls

    def _place(
        self,
        text: CachedText,
        start: int,
        store: Structs,
        attend: Structs,
        of_store: Structs,
        of_attend: Structs,
    ) -> None:
        """Set the calls that write a text's keys and values and attend to them, and their
        arguments, for rows from `start`.
        """
        shape, planes = self._shape, text.planes
        pair, _, slot, _ = (number * planes.itemsize for number in planes.stride())
        layer = planes.data_ptr() + 2 * pair * np.arange(len(self._layers))
        queries = self._qkv.data_ptr() + self._qkv.itemsize * start * self._qkv.stride(0)
        store["function"] = function_address(load_row_kernels().convert[planes.dtype])
        of_store["rows"] = queries + self._qkv.itemsize * shape.heads * shape.dim
        of_store["stride"] = self._qkv.stride(0)
        of_store["out"] = layer + slot * text.slot
        of_store["count"], of_store["pieces"] = text.rows, 2 * shape.kv_heads
        of_store["size"] = of_store["out_stride"] = shape.dim
        of_store["piece_stride"], of_store["work_items"] = planes.stride(1), 1
        for kind, attention in text.attention.items():
            chosen = self._kinds == kind
            of_attend[chosen] = np.frombuffer(bytes(attention.arguments), of_attend.dtype)
            attend["function"] = function_address(attention.kernel.work)
            attend["work_items"][chosen] = attention.arguments.work_items
        of_attend["queries"], of_attend["query_stride"] = queries, self._qkv.stride(0)
        of_attend["keys"], of_attend["values"] = layer, layer + pair
        of_attend["head_stride"] = planes.stride(1)
        out = self._attended
        of_attend["out"] = out.data_ptr() + out.itemsize * start * out.stride(0)

    def _list(self, operations: Sequence[Operation]) -> Structs:
        calls = np.zeros((len(self._layers), len(operations)), CALL)
        for place, one in enumerate(operations):
            calls["function"][:, place] = one.function
            calls["arguments"][:, place] = addresses(one.arguments)
            calls["work_items"][:, place] = 1
        return calls

    def _by_rows(
        self,
        function: Any,
        source: torch.Tensor,
        out: torch.Tensor,
        size: int,
        pieces: int = 1,
        **fields: Any,
    ) -> Operation:
        """Return a function of RowProgram, from rows to rows."""
        arguments = structs(
            RowArguments,
            len(self._layers),
            rows=source.data_ptr(),
            stride=source.stride(0),
            out=out.data_ptr(),
            pieces=pieces,
            size=size,
            **fields,
        )
        return Operation(function_address(function), arguments, source.shape[1], (source, out))

    def _norm(self, norms: Sequence[RMSNorm], source: torch.Tensor, out: torch.Tensor) -> Operation:
        shape = norms[0].weight.shape
        return self._by_rows(
            load_row_kernels().norm,
            source,
            out,
            shape[-1],
            shape[:-1].numel(),
            parameters=[norm.weight.data_ptr() for norm in norms],
            epsilon=[norm.eps for norm in norms],
        )

    def _head_norms(self, norms: Sequence[RMSNorm]) -> list[Operation]:
        """Return the norms of queries and keys, if there are any."""
        if not norms:
            return []
        size = norms[0].weight.numel()
        normed, copy = buffer(size), load_row_kernels().convert[torch.float32]
        stride = self._qkv.stride(0)
        return [
            self._norm(norms, self._qkv, normed),
            self._by_rows(copy, normed, self._qkv, size, out_stride=stride),
        ]

    def _product(
        self,
        weights: Sequence[PackedWeight],
        source: torch.Tensor,
        addend: torch.Tensor | None,
        out: torch.Tensor,
    ) -> list[Operation]:
        """Return the steps of a PackedWeight, from dense rows."""
        first, steps = weights[0], list[Operation]()
        if first.element != torch.float32:
            convert, words = load_row_kernels().convert[first.element], buffer(first.words)
            stride = first.words * words.itemsize // first.element.itemsize
            steps.append(self._by_rows(convert, source, words, first.inner, out_stride=stride))
            source = words
        transposed = buffer(first.words)
        arguments = structs(
            Arguments,
            len(weights),
            rows=source.data_ptr(),
            transposed=transposed.data_ptr(),
            inner=first.words,
            matrix=[weight.matrix.data_ptr() for weight in weights],
            panels=first.matrix.shape[0],
            addend=[weight.constant.data_ptr() for weight in weights]
            if addend is None
            else addend.data_ptr(),
            addend_stride=0 if addend is None else addend.stride(0),
            out=out.data_ptr(),
            out_stride=out.stride(0),
        )
        kernels = [weight.kernel for weight in weights]
        transpose = [function_address(kernel.transpose) for kernel in kernels]
        work = [function_address(kernel.work) for kernel in kernels]
        return [
            *steps,
            Operation(transpose, arguments, 0, (source, transposed)),  # by one thread
            Operation(work, arguments, None, (out,)),  # `work_items` of both is that of the last
        ]


def buffer(width: int) -> torch.Tensor:
    """Return memory for rows of this width, which takes place only as far as it is used."""
    return torch.zeros(MAX_ROWS, width)


def packed(product: object) -> PackedWeight:
    """Return the product. Raises TypeError if it is computed by other code."""
    if not isinstance(product, PackedWeight):
        raise TypeError(f"a product by {type(product).__name__}")
    return product


def can_list(layers: Sequence[LlamaLayer], shape: HeadShape) -> bool:
    """Return whether compiled functions compute all that these layers do."""
    products = [
        product.product
        for layer in layers
        for product in (layer.qkv, layer.out, layer.gate_up, layer.down)
    ]
    if not is_supported() or not all(isinstance(one, PackedWeight) for one in products):
        return False
    sizes = shape.dim, layers[0].before.weight.shape[-1], layers[0].down.weight.shape[1]
    biased = any(layer.out.bias is not None or layer.down.bias is not None for layer in layers)
    return min(sizes) >= LANES and not biased
