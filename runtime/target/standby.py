"""Keeps the KV of texts that other targets write, so that this one can take them over at once.

They are read when nothing else is to be done, and for a small share of the time beside sessions.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from runtime.core.clock import Clock
from runtime.core.errors import SESSION_FAULTS
from runtime.core.messages import StandbyText
from runtime.kv.base import KVCache
from runtime.kv.prefix_cache import Ids, PrefixCache, PrefixKey
from runtime.models.base import Model, PassInput, causal

log = logging.getLogger(__name__)

BUSY_SHARE = 0.02  # of the time, while sessions are running
MIN_PASS_S = 0.02  # a pass may take so long, or as long as a step of the target
MIN_ROWS, MAX_ROWS = 8, 512  # of a pass


def next_rows(rows: int, seconds: float, most_s: float) -> int:
    """Return the rows of the next pass, after a pass of `rows` rows that took `seconds`.

    It shall take `most_s` seconds: an arriving request waits for it.
    """
    fitting = rows * most_s / seconds if seconds > 0 else 2.0 * rows
    return max(MIN_ROWS, min(MAX_ROWS, 2 * rows, int(fitting)))


@dataclass(slots=True)
class KnownText:
    """A text of another target; `cache` holds its first tokens."""

    tokens: list[int]
    cache: KVCache
    as_ids: Ids | None = None

    def extend(self, tokens: Sequence[int]) -> None:
        self.tokens.extend(tokens)
        self.as_ids = None

    @property
    def ids(self) -> Ids:
        if self.as_ids is None:
            self.as_ids = np.asarray(self.tokens, dtype=np.int64)
        return self.as_ids

    @property
    def unread(self) -> int:
        return len(self.tokens) - self.cache.length


@dataclass(slots=True)
class StandbyTexts:
    """Texts of at most `max_tokens` tokens in all.

    A text that does not fit is not kept: those that are there stay useful. Each text has a name
    that is its own among those of one source, which is a caller of this target.

    read     tokens read since the start
    rows     of the next pass
    allowed  clock reading from which on a pass may run beside sessions
    """

    model: Model
    clock: Clock
    max_tokens: int
    texts: dict[tuple[int, str], KnownText] = field(default_factory=dict)
    tokens: int = 0
    read: int = 0
    rows: int = MIN_ROWS
    allowed: float = 0.0

    @property
    def slots(self) -> int:
        """Slots with allocated memory."""
        return sum(text.cache.room for text in self.texts.values())

    @property
    def unread(self) -> bool:
        return any(text.unread for text in self.texts.values())

    def in_use(self) -> Iterator[tuple[Ids, KVCache]]:
        """Return the texts with their caches, which hold them as far as they reach."""
        return ((text.ids, text.cache) for text in self.texts.values() if text.cache.length)

    def update(self, source: int, update: StandbyText) -> None:
        """Extend a text, begin one, or drop one. What does not continue its text drops it."""
        name = source, update.session
        known = self.texts.get(name)
        fits = self.tokens + len(update.tokens) <= self.max_tokens
        if update.over or not fits or update.start != (len(known.tokens) if known else 0):
            self._drop(name)
            return
        if known is None:
            known = self.texts[name] = KnownText([], self.model.new_cache())
        known.extend(update.tokens)
        self.tokens += len(update.tokens)
        if len(known.tokens) > self.model.context:
            self._drop(name)

    def forget(self, source: int) -> None:
        """Drop all texts of a source."""
        for name in [name for name in self.texts if name[0] == source]:
            self._drop(name)

    def _drop(self, name: tuple[int, str]) -> None:
        if (text := self.texts.pop(name, None)) is not None:
            self.tokens -= len(text.tokens)

    def read_idle(
        self, prefixes: PrefixCache, others: Iterable[tuple[Sequence[int] | Ids, KVCache]] = ()
    ) -> bool:
        """Run one pass; return False if there is nothing to read."""
        return self._read(prefixes, others, MIN_PASS_S)

    def read_busy(
        self,
        prefixes: PrefixCache,
        others: Iterable[tuple[Sequence[int] | Ids, KVCache]],
        step_s: float,
    ) -> bool:
        """Run one pass if such passes take at most BUSY_SHARE of the time; return True if it ran.

        step_s  usual seconds of a step of the target
        """
        if (began := self.clock()) < self.allowed:
            return False
        ran = self._read(prefixes, others, max(MIN_PASS_S, step_s))
        ended = self.clock()
        self.allowed = ended + (ended - began) * (1.0 / BUSY_SHARE - 1.0)
        return ran

    def _read(
        self,
        prefixes: PrefixCache,
        others: Iterable[tuple[Sequence[int] | Ids, KVCache]],
        most_s: float,
    ) -> bool:
        """Run one pass over the texts with the most unread tokens.

        Texts that are begun come first, and of texts with a common beginning one is begun: the
        others copy what it has read.
        """
        waiting = sorted(
            (item for item in self.texts.items() if item[1].unread),
            key=lambda item: (item[1].cache.length > 0, item[1].unread),
            reverse=True,
        )
        if not waiting:
            return False
        left, parts, begun = self.rows, dict[tuple[int, str], PassInput](), set[PrefixKey]()
        known = list(others) if any(not text.cache.length for _, text in waiting) else []
        began = self.clock()
        try:
            for name, text in waiting:
                if left <= 0:
                    break
                if not text.cache.length:
                    if (beginning := prefixes.prefix_key(text.tokens)) in begun:
                        continue
                    begun.add(beginning)
                    if found := prefixes.longest(text.tokens, [*known, *self.in_use()]):
                        text.cache = found[0].fork(found[1])
                start = text.cache.length
                tokens = text.ids[start : start + left]
                parts[name] = PassInput(text.cache, causal(tokens, start), 0)
                left -= len(tokens)
            self.model.forward_all(list(parts.values()))
        except SESSION_FAULTS as error:
            log.warning("texts of other targets are not read: %s: %s", type(error).__name__, error)
            for name in parts or [waiting[0][0]]:
                self._drop(name)
            return True
        self.read += self.rows - left
        if left <= 0:
            self.rows = next_rows(self.rows, self.clock() - began, most_s)
        return True
