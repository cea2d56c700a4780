"""LlamaPass with fixed shapes and addresses, so that a GPU can record a pass once and replay it.

Rows are padded to 1, 2, 4, ... 128 and slots to 256, 512, ...; each such shape is recorded at its
first use. Keys and values are in an Arena. All rows attend to all seats of a block of adjacent
seats, and each row takes the result of its own seat. With few rows attention is bound by memory,
not by arithmetic, and linear layers process no row twice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from runtime.kernels.cuda_graph import Record, Run
from runtime.kv.arena import Arena
from runtime.models.attention_mask import additive_mask
from runtime.models.base import OutputSpec, PassInput, PassOutput
from runtime.models.generic import logit_rows, torch_cache
from runtime.models.hf import ForwardPass
from runtime.models.layer_states import split_features
from runtime.models.llama import LlamaPass, row_ends

MAX_ROWS = 128  # over all texts; a step of one text has at most limits.STEP_ROWS + 1 = 65
MIN_SLOTS = 256
NO_OUTPUTS = OutputSpec()


@dataclass(frozen=True, slots=True)
class PassShape:
    """The shape of a pass: `rows` rows see `slots` slots of the seats [first, first + seats)."""

    first: int
    seats: int
    rows: int
    slots: int


@dataclass(frozen=True, slots=True)
class InputBuffers:
    """The input addresses of the passes of one shape.

    ids     int64 (4, rows): tokens, positions, places in the arena counted through all seats (slots
            + 1 per seat), and the index of the row's own attention result among seats x rows
    hidden  bool (windows, rows, slots): slots of its own seat that a row does not see
    """

    ids: torch.Tensor
    hidden: torch.Tensor


class StaticPass(LlamaPass):
    """A ForwardPass of fixed shapes; parts that are too many or too long go to `fallback`.

    `record` turns a function into one that does the same in the same memory. Pseudo rows are not
    recorded. A hidden slot must hold finite numbers: after a guess overflows, the text may come out
    as NaN where `fallback` would ignore the guess.
    """

    def __init__(
        self, module: PreTrainedModel, arena: Arena, fallback: ForwardPass, record: Record
    ) -> None:
        # LlamaPass creates tensors on the default device. Only calls of torch can be recorded.
        with module.device:
            super().__init__(module, compiled=False)
            self._rope = self._rope_table(min(arena.slots, self._context))
        self._arena, self._fallback, self._record = arena, fallback, record
        self._child_entries = arena.memory.flatten(2, 3).unflatten(0, (-1, 2)).unbind(0)
        self._group = self._heads // self._kv
        # Shared by all shapes: a GPU would otherwise keep the logits of every graph.
        self._logits = torch.zeros((MAX_ROWS, self._head.weight.shape[0]), device=module.device)
        self._hidden = torch.zeros(
            (MAX_ROWS, self._embedding.shape[1]), dtype=self._dtype, device=module.device
        )
        self._buffers: dict[PassShape, InputBuffers] = {}
        # Rows of the layers that somebody asked for, (MAX_ROWS, d) in bfloat16
        self._states: dict[int, torch.Tensor] = {}
        self._runs: dict[tuple[PassShape, bool, tuple[int, ...]], Run] = {}  # and by their outputs

    def __call__(self, parts: Sequence[PassInput]) -> list[torch.Tensor]:
        if not self.has_room(parts):
            return self._fallback(parts)
        logits, ends = self._replay(parts, NO_OUTPUTS), row_ends(parts)
        return [
            logits[end - logit_rows(part) : end].clone()
            for part, end in zip(parts, ends, strict=True)
        ]

    def show(self, parts: Sequence[PassInput], output_spec: OutputSpec) -> list[PassOutput]:
        """Implement ForwardPass. Parts that go to `fallback` have no pseudo rows there."""
        if not self.has_room(parts):
            return self._fallback.show(parts, replace(output_spec, branches=()))
        if output_spec.branches and any(part.branch_rows for part in parts):
            return super().show(parts, output_spec)
        logits, counts = (
            self._replay(parts, output_spec),
            [len(part.rows.tokens) for part in parts],
        )
        hidden = (
            self._hidden[: sum(counts)].clone().split(counts)
            if output_spec.hidden
            else [None] * len(parts)
        )
        layers = output_spec.features
        features = split_features(layers, [self._states[layer] for layer in layers], counts)
        return [
            PassOutput(own, states, features=shown)
            for own, states, shown in zip(
                logits[: sum(counts)].clone().split(counts), hidden, features, strict=True
            )
        ]

    def _replay(self, parts: Sequence[PassInput], output_spec: OutputSpec) -> torch.Tensor:
        """Return the logits of all rows, followed by padding rows; valid until the next pass."""
        seats = self._arena.assign([torch_cache(part) for part in parts])
        shape = shape_of(parts, seats, self._arena.slots)
        buffers = self._buffers_for(shape)
        for buffer, values in zip(
            (buffers.ids, buffers.hidden),
            layout_inputs(parts, seats, shape, self._arena.slots, self._windows),
            strict=True,
        ):
            buffer.copy_(torch.from_numpy(values))
        hidden, features = output_spec.hidden, output_spec.features
        run = self._runs.get((shape, hidden, features))
        if run is None:
            for layer in features:
                if layer not in self._states:
                    self._states[layer] = torch.zeros_like(self._hidden, dtype=torch.bfloat16)
            run = self._runs[shape, hidden, features] = self._record(
                partial(self._compute, shape, buffers, hidden, features)
            )
        return run()

    def has_room(self, parts: Sequence[PassInput]) -> bool:
        """Return whether these parts fit this pass."""
        rows = sum(len(part.rows.tokens) for part in parts)
        slots = max(torch_cache(part).length for part in parts)
        longest = max(int(part.rows.positions.max()) for part in parts)
        return (
            rows <= MAX_ROWS
            and len(parts) <= self._arena.seats
            and slots <= self._arena.slots
            and longest < len(self._rope)
        )

    def _buffers_for(self, shape: PassShape) -> InputBuffers:
        if shape not in self._buffers:
            device = self._embedding.device
            self._buffers[shape] = InputBuffers(
                torch.zeros((4, shape.rows), dtype=torch.int64, device=device),
                torch.zeros(
                    (len(self._windows), shape.rows, shape.slots), dtype=torch.bool, device=device
                ),
            )
        return self._buffers[shape]

    def _compute(
        self, shape: PassShape, buffers: InputBuffers, hidden: bool, features: tuple[int, ...] = ()
    ) -> torch.Tensor:
        """Return the float32 logits (rows, vocabulary) of all rows in the buffers.

        They are valid until the next call for any shape. With `hidden` the hidden states are kept
        too, and those of the layers in `features`. The operations do not depend on the content of
        the buffers.
        """
        tokens, positions, places, own = buffers.ids.unbind(0)
        n, middle = shape.rows, self._heads + self._kv
        masks = dict(zip(self._windows, self._masks(buffers.hidden), strict=True))
        cos, sin = self._rope.index_select(0, positions).unbind(1)
        x = self._embedding.index_select(0, tokens)
        for index, layer in enumerate(self._layers):
            if index in features:
                self._states[index][:n].copy_(x)
            qkv = layer.qkv(layer.before(x)).view(n, middle + self._kv, self._dim)
            qk = qkv.narrow(1, 0, middle)
            plain = qk if layer.heads is None else layer.heads(qk)
            torch.addcmul(plain * cos, plain.roll(self._dim // 2, -1), sin, out=qk)
            queries, new = qkv.split((self._heads, 2 * self._kv), 1)
            self._child_entries[index].index_copy_(
                2, places, new.view(n, 2, self._kv, self._dim).permute(1, 2, 0, 3)
            )
            x = layer.out(self._attend_seats(index, shape, queries, masks[layer.kind], own), x)
            gate, up = layer.gate_up(layer.after(x)).chunk(2, -1)
            x = layer.down(F.silu(gate).mul_(up), x)
        if len(self._layers) in features:
            self._states[len(self._layers)][:n].copy_(x)
        x = self._norm(x)
        if hidden:
            self._hidden[:n].copy_(x)
        return self._logits[:n].copy_(self._head(x))

    def _masks(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Return the additive mask of each window (query heads per key head x rows, slots)."""
        added = torch.zeros_like(hidden, dtype=self._dtype).masked_fill_(hidden, -torch.inf)
        return list(added.repeat(1, self._group, 1).unbind(0))

    def _attend_seats(
        self,
        index: int,
        shape: PassShape,
        queries: torch.Tensor,
        mask: torch.Tensor,
        own: torch.Tensor,
    ) -> torch.Tensor:
        """Return (rows, heads * dim), from (rows, heads, dim).

        Query heads that share a key head become further rows of it, so that no kernel repeats or
        rereads keys.
        """
        block = self._arena.memory[
            2 * index : 2 * index + 2, :, shape.first : shape.first + shape.seats, : shape.slots
        ]
        keys, values = block.transpose(1, 2).unbind(0)
        grouped = queries.unflatten(1, (self._kv, self._group)).permute(1, 2, 0, 3).flatten(1, 2)
        output = F.scaled_dot_product_attention(
            grouped.expand(shape.seats, -1, -1, -1),
            keys,
            values,
            attn_mask=mask.expand(shape.seats, 1, -1, -1),
            scale=self._scale,
        )
        by_row = (
            output.unflatten(2, (self._group, shape.rows))
            .permute(0, 3, 1, 2, 4)
            .reshape(shape.seats * shape.rows, -1)
        )
        result: torch.Tensor = by_row if shape.seats == 1 else by_row.index_select(0, own)
        return result


def shape_of(parts: Sequence[PassInput], seats: Sequence[int], most: int) -> PassShape:
    """Return the smallest shape for these parts; a seat has `most` slots.

    A block has a power of two seats and begins at a multiple of that.
    """
    width = 1
    while len({seat // width for seat in seats}) > 1:
        width *= 2
    rows = next_power_of_two(sum(len(part.rows.tokens) for part in parts))
    slots = min(
        most, max(MIN_SLOTS, next_power_of_two(max(torch_cache(part).length for part in parts)))
    )
    return PassShape(min(seats) // width * width, width, rows, slots)


def next_power_of_two(count: int) -> int:
    """Return the smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()


def layout_inputs(
    parts: Sequence[PassInput],
    seats: Sequence[int],
    shape: PassShape,
    slots: int,
    windows: Mapping[str, int | None],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the content of InputBuffers of this shape; a seat has `slots` slots.

    Padding rows see slot 0 and are written after the slots.
    """
    ids = np.zeros((4, shape.rows), dtype=np.int64)
    hidden = np.ones((len(windows), shape.rows, shape.slots), dtype=np.bool_)
    end = 0
    for part, seat in zip(parts, seats, strict=True):
        cache, rows = torch_cache(part), part.rows
        begin, end = end, end + len(rows.tokens)
        ids[:, begin:end] = (
            rows.tokens,
            rows.positions,
            seat * (slots + 1) + np.arange(cache.start, cache.length),
            (seat - shape.first) * shape.rows + np.arange(begin, end),
        )
        for kind, window in enumerate(windows.values()):
            mask = additive_mask(rows, cache.positions, window, 1.0)
            hidden[kind, begin:end, : cache.length] = False if mask is None else mask
    ids[2, end:] = slots
    hidden[:, end:, 0] = False
    return ids, hidden
