"""Caches of finished texts, kept so that a text that begins like one of them need not be read again."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.kv.base import KVCache

Ids = npt.NDArray[np.int64]
PrefixKey = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class CachedText:
    """A finished text, and the cache that holds it. `prefix_key`: its first tokens; most texts differ there already."""

    prefix_key: PrefixKey
    ids: Ids
    cache: KVCache


class PrefixCache:
    """Owns the caches given to it: at most `max_slots` slots together, the least recently used go first.

    What two texts have in common counts from `min_tokens` tokens on: fewer are read faster than looked for.
    """

    def __init__(self, max_slots: int, min_tokens: int = 16) -> None:
        self.max_slots, self.min_tokens = max_slots, min_tokens
        self.kept: list[CachedText] = []  # the least recently used first

    @property
    def slots(self) -> int:
        """For which memory is taken."""
        return sum(kept.cache.room for kept in self.kept)

    def keep(self, tokens: Sequence[int], cache: KVCache) -> None:
        """Take the cache over. Its first slots hold `tokens`; what is behind them is dropped.

        A text that continues a kept one takes its place; one that a kept one continues adds nothing. Raises IndexError where
        the cache has fewer slots than there are tokens.
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
        # A long text's cache may be mostly empty now.
        self.kept.append(
            CachedText(
                prefix_key, ids, cache.fork(len(ids)) if cache.room > 2 * len(ids) else cache
            )
        )
        while self.slots > self.max_slots:
            self.kept.pop(0)

    def longest(
        self, tokens: Sequence[int], others: Iterable[tuple[Sequence[int], KVCache]] = ()
    ) -> tuple[KVCache, int] | None:
        """The cache whose text has most in common with `tokens`, and how many tokens: at most all but the last.

        Looked through are the kept texts and `others`: caches in use, whose first slots hold the text as far as they reach. To
        be forked before it is used. None where nothing is worth it.
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

    def prefix_key(self, tokens: Sequence[int]) -> PrefixKey:
        """What two texts must have in common to have enough in common."""
        return tuple(tokens[: self.min_tokens])


def common_length(a: Ids, b: Ids) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n
