"""Keeps caches of finished texts, so that texts with the same prefix skip part of the prefill."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.core.features import FeatureBuffer
from runtime.kv.base import KVCache

Ids = npt.NDArray[np.int64]
PrefixKey = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class CachedText:
    """A finished text with its cache. `prefix_key` holds its first tokens, which differ for most
    texts.
    """

    prefix_key: PrefixKey
    ids: Ids
    cache: KVCache
    features: FeatureBuffer | None = None


class PrefixCache:
    """Owns caches of at most `max_slots` - `reserved` slots in total, evicting the least recently
    used ones.

    Common prefixes shorter than `min_tokens` do not count, because reading them is faster than
    searching.
    """

    def __init__(self, max_slots: int, min_tokens: int = 16) -> None:
        self.max_slots, self.min_tokens = max_slots, min_tokens
        self.feature_slots = 0.0  # slots whose memory the features of one token take
        self.reserved = 0  # of max_slots, for others
        self.kept: list[CachedText] = []  # the least recently used first

    @property
    def slots(self) -> int:
        """Slots with allocated memory, and those whose memory the features take."""
        rows = sum(len(kept.ids) for kept in self.kept if kept.features is not None)
        return sum(kept.cache.room for kept in self.kept) + math.ceil(rows * self.feature_slots)

    def keep(
        self, tokens: Sequence[int], cache: KVCache, features: FeatureBuffer | None = None
    ) -> None:
        """Take ownership of a cache whose first slots hold `tokens`, and drop the slots after them.

        A text that extends a cached one replaces it; a prefix of a cached one adds nothing. Raises
        IndexError if the cache has fewer slots than tokens.
        """
        cache.truncate(len(tokens))
        ids, prefix_key = np.asarray(tokens, dtype=np.int64), self.prefix_key(tokens)
        if not self.min_tokens <= len(ids) <= self.max_slots:
            return
        shared = {
            i: common_length(ids, kept.ids)
            for i, kept in enumerate(self.kept)
            if kept.prefix_key == prefix_key
        }
        for i, count in shared.items():
            if count == len(ids):
                self.kept.append(self.kept.pop(i))
                return
        self.kept = [kept for i, kept in enumerate(self.kept) if shared.get(i, 0) < len(kept.ids)]
        # The cache of a text that was longer may be mostly empty now.
        self.kept.append(
            CachedText(
                prefix_key,
                ids,
                cache.fork(len(ids)) if cache.room > 2 * len(ids) else cache,
                None if features is None else features.fork(len(ids)),
            )
        )
        self._evict()

    def reserve(self, slots: int) -> None:
        """Leave so many of `max_slots` to others from now on."""
        self.reserved = slots
        self._evict()

    def _evict(self) -> None:
        while self.kept and self.slots > self.max_slots - self.reserved:
            self.kept.pop(0)

    def longest(
        self, tokens: Sequence[int], others: Iterable[tuple[Sequence[int] | Ids, KVCache]] = ()
    ) -> tuple[KVCache, int] | None:
        """Find the cache with the longest common prefix, at most all tokens but the last.

        The search covers the cached texts and `others`, caches in use whose first slots hold the
        given text as far as they reach. Returns the cache, to be forked before use, and the number
        of common tokens, or None if no common prefix is long enough.
        """
        ids, prefix_key = np.asarray(tokens[:-1], dtype=np.int64), self.prefix_key(tokens)
        found, best = None, max(self.min_tokens, 1) - 1
        for other, cache in others:
            if self.prefix_key(other) == prefix_key:
                n = min(common_length(ids, np.asarray(other, dtype=np.int64)), cache.length)
                if n > best:
                    found, best = cache, n
        place = None
        for i, kept in enumerate(self.kept):
            if kept.prefix_key == prefix_key and (n := common_length(ids, kept.ids)) > best:
                found, best, place = kept.cache, n, i
        if place is not None:
            self.kept.append(self.kept.pop(place))
        return None if found is None else (found, best)

    def features_of(self, cache: KVCache) -> FeatureBuffer | None:
        """Return the features kept beside a cache that `longest` has found."""
        return next((kept.features for kept in self.kept if kept.cache is cache), None)

    def prefix_key(self, tokens: Sequence[int] | Ids) -> PrefixKey:
        """Return the tokens that two texts must share to have a common prefix that counts."""
        return tuple(tokens[: self.min_tokens])


def common_length(a: Ids, b: Ids) -> int:
    """Return the length of the longest common prefix."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n
