"""Presents the caches of several texts as one transformers `Cache`; each text's rows go to its own
cache.
"""

from collections.abc import Sequence
from typing import Any, cast
from weakref import proxy

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    LinearAttentionCacheLayerMixin,
)

from runtime.kv.store import TorchCache

States = tuple[torch.Tensor, torch.Tensor]


class PackedCache(Cache):
    """The cache of a model with `count` layers in a pass over the rows of several texts,
    concatenated.

    `caches` already have room for their rows, by `append`. Keys and values of different texts do
    not fit one tensor, so `update` returns only the new rows, and attention reads everything from
    `take_written`.
    """

    def __init__(self, caches: Sequence[TorchCache], count: int) -> None:
        layers: list[CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer] = [
            PackedLayer(self, index) for index in range(count)
        ]
        super().__init__(layers=layers)
        self.caches = caches
        self._written: list[States] | None = None

    def write(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        rows = [cache.length - cache.start for cache in self.caches]
        pieces = zip(self.caches, keys.split(rows, dim=2), values.split(rows, dim=2), strict=True)
        self._written = [cache.layers[index].update(*states) for cache, *states in pieces]

    def take_written(self) -> list[States]:
        """Return each text's keys and values of the layer written last.

        Raises LookupError if they were taken before.
        """
        if self._written is None:
            raise LookupError("attention over keys that this layer has not written")
        written, self._written = self._written, None
        return written


class PackedLayer(CacheLayerMixin):
    """Layer `index` of all texts. It reports no length, because its passes bring masks and
    positions.
    """

    is_sliding = False

    def __init__(self, cache: PackedCache, index: int) -> None:
        super().__init__()
        self.cache = cast(
            PackedCache, proxy(cache)
        )  # a weak reference, so that no cycle keeps the caches of a pass alive
        self.index = index
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the caches are complete from the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> States:
        self.cache.write(self.index, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1
