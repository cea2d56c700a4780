"""Stores keys and values of one text in torch tensors: a transformers `Cache` with exact rollback.

Layers of equal shape share one tensor (planes, heads, capacity, dim). A plane holds the keys or the
values of a layer, so a rollback takes one copy per shape, not one per layer. Sliding-window layers
are stored in full: the mask, which the model builds from the positions kept here, implements the
window.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast
from weakref import proxy

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from runtime.core.errors import InvalidRequest

INITIAL_SLOTS = 64

Shape = tuple[int, int]  # heads, dim
Layout = Sequence[tuple[Shape, Shape]]  # shapes of keys and values, by layer


class TorchCache(Cache):
    """A KVCache (runtime.kv.base). Memory grows with use, by at least a quarter, up to `capacity`
    slots.

    positions  int64 (length,): the position in the text of each slot, written by the model
    """

    def __init__(
        self, layout: Layout, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity, self.length, self.start = capacity, 0, 0
        self._layout, self._dtype, self._device = layout, dtype, device
        self._child_entries = np.zeros(0, dtype=np.int64)
        self._planes: dict[Shape, torch.Tensor] = {}
        for shape in dict.fromkeys(shape for pair in layout for shape in pair):
            count = sum(pair.count(shape) for pair in layout)
            self._planes[shape] = torch.empty(
                (count, shape[0], 0, shape[1]), dtype=dtype, device=device
            )
        taken = dict.fromkeys(self._planes, 0)
        layers: list[CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer] = []
        for pair in layout:
            places = []
            for shape in pair:
                places.append((shape, taken[shape]))
                taken[shape] += 1
            layers.append(TorchLayer(self, *places))
        super().__init__(layers=layers)

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        return self._child_entries[: self.length]

    @property
    def room(self) -> int:
        return len(self._child_entries)

    @property
    def slot_bytes(self) -> int:
        """Bytes per token, all layers together."""
        return sum(
            planes.shape[0] * planes.shape[1] * planes.shape[3] * planes.element_size()
            for planes in self._planes.values()
        )

    def append(self, rows: int) -> int:
        length = self.length + rows
        if length > self.capacity:
            raise InvalidRequest(
                f"{length} tokens and guesses do not fit the cache of {self.capacity}: "
                "shorten the prompt or the output"
            )
        if length > len(self._child_entries):
            self._grow(
                min(self.capacity, max(length, len(self._child_entries) * 5 // 4, INITIAL_SLOTS))
            )
        self.start, self.length = self.length, length
        return self.start

    def keep(self, prefix: int, slots: Sequence[int]) -> None:
        if not 0 <= prefix <= self.length or any(
            not prefix <= slot < self.length for slot in slots
        ):
            raise IndexError(
                f"prefix {prefix} and slots {list(slots)} of a cache of {self.length} slots"
            )
        if len(set(slots)) != len(slots):
            raise IndexError(f"slots {list(slots)} name one twice")
        end = prefix + len(slots)
        still = 0
        while still < len(slots) and slots[still] == prefix + still:
            still += 1
        if still < len(slots):
            chosen = np.asarray(slots[still:], dtype=np.int64)
            self._child_entries[prefix + still : end] = self._child_entries[chosen]
            with torch.no_grad():
                for planes in self._planes.values():
                    index = torch.from_numpy(chosen).to(planes.device)
                    planes[:, :, prefix + still : end] = planes.index_select(2, index)
        self.start = self.length = end

    def truncate(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise IndexError(f"length {length} of a cache of {self.length} slots")
        self.start = self.length = length

    def fork(self, length: int) -> "TorchCache":
        if not 0 <= length <= self.length:
            raise IndexError(f"length {length} of a cache of {self.length} slots")
        other = TorchCache(self._layout, self.capacity, self._dtype, self._device)
        other.append(length)
        other.positions[:] = self.positions[:length]
        with torch.no_grad():
            for shape, planes in self._planes.items():
                other._planes[shape][:, :, :length] = planes[:, :, :length]
        other.start = length
        return other

    def plane(self, shape: Shape, place: int) -> torch.Tensor:
        """Return one layer's keys or values, (1, heads, length, dim), as a view."""
        return self._planes[shape][place : place + 1, :, : self.length]

    def planes(self) -> torch.Tensor:
        """Return all keys and values, alternating by layer, (2 x layers, heads, slots, dim).

        All layers must have the same shape. The result is a view of all allocated slots.
        """
        (planes,) = self._planes.values()
        return planes

    def _grow(self, slots: int) -> None:
        grown: dict[Shape, torch.Tensor] = {}
        # A tensor made in inference mode is read-only outside of it.
        with torch.inference_mode(False), torch.no_grad():
            for shape, old in self._planes.items():
                # Uninitialised memory may hold NaN, but no slot is read before it is written.
                grown[shape] = old.new_empty((old.shape[0], old.shape[1], slots, old.shape[3]))
                grown[shape][:, :, : self.length] = old[:, :, : self.length]
        places = np.zeros(slots, dtype=np.int64)
        places[: self.length] = self.positions
        self._planes, self._child_entries = (
            grown,
            places,
        )  # assigned together: a failed allocation changes nothing


class TorchLayer(CacheLayerMixin):
    """One attention layer's view of the cache, as transformers calls it."""

    is_sliding = False

    def __init__(
        self, cache: TorchCache, keys: tuple[Shape, int], values: tuple[Shape, int]
    ) -> None:
        super().__init__()
        # A weak reference: a cycle would keep finished texts' memory until the next collection.
        self.cache = cast(TorchCache, proxy(cache))
        self.places = keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the cache is complete from the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the rows of the pass into the appended slots.

        Returns keys and values of all slots in use, the new ones included.
        """
        return self._write(self.places[0], key_states), self._write(self.places[1], value_states)

    def _write(self, place: tuple[Shape, int], states: torch.Tensor) -> torch.Tensor:
        plane = self.cache.plane(*place)
        plane[:, :, self.cache.start :] = states
        return plane

    def get_seq_length(self) -> int:
        return self.cache.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.start + query_length, 0

    def get_max_length(self) -> int:
        return self.cache.capacity


def layout_of(layers: Iterable[Any]) -> list[tuple[Shape, Shape]]:
    """Return the shapes of a filled transformers cache, by layer.

    Raises ValueError for a layer that stores anything but keys and values of single tokens.
    """
    layout = []
    for layer in layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
            raise ValueError(f"cache layer of type {type(layer).__name__}")
        layout.append(
            (
                (layer.keys.shape[1], layer.keys.shape[3]),
                (layer.values.shape[1], layer.values.shape[3]),
            )
        )
    return layout
