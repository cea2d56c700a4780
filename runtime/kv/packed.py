"""The caches of several texts as one transformers `Cache`: each text's rows of a pass go into the cache of that text."""

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
    """What a model of `count` layers writes to in a pass over the rows of several texts, laid behind each other.

    `caches` have room for their rows, which they were told of with `append`. Keys and values of different texts do not fit one
    tensor, so `update` returns the new rows alone, and what attention is to read waits in `take_written`.
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
        """Of each text, all keys and values of the layer written last. Raises LookupError where they were taken before."""
        if self._written is None:
            raise LookupError("attention over keys that this layer has not written")
        written, self._written = self._written, None
        return written


class PackedLayer(CacheLayerMixin):
    """Layer `index` of all texts. It has no length of its own: the passes that use it bring masks and positions."""

    is_sliding = False

    def __init__(self, cache: PackedCache, index: int) -> None:
        super().__init__()
        self.cache = cast(
            PackedCache, proxy(cache)
        )  # not held, or the caches of a pass would wait for a search for cycles
        self.index = index
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the caches are made whole."""

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
