"""An exact, tiny model that serves as oracle: its logits are a pure function of the visible tokens.

It reads tokens through cache, positions and mask like any model, so a fault in one of them changes
the output. It computes in integers first, so the number of rows in a pass changes nothing.
"""

from collections.abc import Sequence
from functools import reduce

import numpy as np
import numpy.typing as npt

from runtime.core.errors import InvalidRequest
from runtime.core.node_keys import EMPTY_TEXT, mix64
from runtime.kv.base import KVCache
from runtime.models.base import PassInput, Rows


class ToyCache:
    """Stores tokens and positions in place of keys and values."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.tokens: list[int] = []
        self.positions: list[int] = []

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def room(self) -> int:
        return self.length

    def append(self, rows: int) -> int:
        first = self.length
        if first + rows > self.capacity:
            raise InvalidRequest(
                f"{first} + {rows} slots are over the capacity of {self.capacity}: shorten the text"
            )
        self.tokens += [-1] * rows
        self.positions += [-1] * rows
        return first

    def keep(self, prefix: int, slots: Sequence[int]) -> None:
        if any(not prefix <= slot < self.length for slot in slots) or prefix > self.length:
            raise IndexError(f"slots {list(slots)} are not all in [{prefix}, {self.length})")
        self.tokens = self.tokens[:prefix] + [self.tokens[slot] for slot in slots]
        self.positions = self.positions[:prefix] + [self.positions[slot] for slot in slots]

    def fork(self, length: int) -> "ToyCache":
        if not 0 <= length <= self.length:
            raise IndexError(f"length {length} is above the present {self.length}")
        other = ToyCache(self.capacity)
        other.tokens, other.positions = self.tokens[:length], self.positions[:length]
        return other

    def truncate(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise IndexError(f"length {length} is above the present {self.length}")
        del self.tokens[length:], self.positions[length:]


class ToyModel:
    """The toy model.

    sharpness  scales the logits: 0 makes all tokens equally likely
    memory     number of last tokens that matter (0: all)
    """

    name = "toy"

    def __init__(
        self, vocabulary: int = 32, context: int = 512, sharpness: float = 2.0, memory: int = 0
    ) -> None:
        self.vocabulary, self.context, self.sharpness, self.memory = (
            vocabulary,
            context,
            sharpness,
            memory,
        )

    def new_cache(self) -> ToyCache:
        return ToyCache(self.context + 512)

    def forward(
        self, cache: KVCache, rows: Rows, last: int | None = None
    ) -> npt.NDArray[np.float32]:
        return self.forward_all([PassInput(cache, rows, last)])[0]

    def forward_all(self, parts: Sequence[PassInput]) -> list[npt.NDArray[np.float32]]:
        lengths = [part.cache.length for part in parts]
        done = False
        try:
            logits = [self.read(part) for part in parts]
            done = True
            return logits
        finally:
            if not done:
                for part, length in zip(parts, lengths, strict=True):
                    part.cache.truncate(length)

    def read(self, part: PassInput) -> npt.NDArray[np.float32]:
        """Compute one part of a pass. An error leaves its rows in the cache."""
        cache, rows = part.cache, part.rows
        if not isinstance(cache, ToyCache):
            raise TypeError(f"a cache of type {type(cache).__name__}: use new_cache()")
        first, n = cache.append(len(rows.tokens)), len(rows.tokens)
        cache.tokens[first:] = rows.tokens.tolist()
        cache.positions[first:] = rows.positions.tolist()
        logits = np.empty(
            (n if part.last is None else min(part.last, n), self.vocabulary), dtype=np.float32
        )
        for place, row in enumerate(range(n - len(logits), n)):
            logits[place] = self.logits(self.seen(cache, rows.prefix, rows.visible[row]))
        return logits

    def seen(self, cache: ToyCache, prefix: int, visible: npt.NDArray[np.bool_]) -> list[int]:
        """Return the tokens of the visible slots by position.

        Raises ValueError unless the positions are 0, 1, 2, ...
        """
        slots = [*range(prefix), *(prefix + np.flatnonzero(visible)).tolist()]
        slots.sort(key=lambda slot: cache.positions[slot])
        if [cache.positions[slot] for slot in slots] != list(range(len(slots))):
            raise ValueError(
                "positions of the visible slots are not contiguous: "
                f"{[cache.positions[slot] for slot in slots]}"
            )
        return [cache.tokens[slot] for slot in slots]

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits (vocabulary,) after the text `tokens`."""
        generator = np.random.default_rng(reduce(mix64, tokens[-self.memory :], EMPTY_TEXT))
        return (self.sharpness * generator.standard_normal(self.vocabulary)).astype(np.float32)
