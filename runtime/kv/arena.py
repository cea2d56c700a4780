"""Memory that stays where it is, for the keys and values of a few texts: what a pass that is recorded once can point into.

A text that takes a seat moves into the arena and stays the TorchCache that it was: it appends, keeps, truncates and forks by the same
code, on a view. When another text needs the seat, or the text outgrows it, it moves out into memory of its own.
"""

from collections.abc import Sequence
from weakref import ref

import numpy as np
import torch

from runtime.kv.store import INITIAL_SLOTS, TorchCache


class Arena:
    """Seats of `slots` slots each, for caches whose layers all have the shape of those of `like`.

    memory  (planes, heads, seats, slots + 1, dim); no text reads the last slot of a seat: rows of no text are written there
    """

    def __init__(self, like: TorchCache, seats: int, slots: int) -> None:
        planes, heads, _, dim = like.planes().shape
        self.seats, self.slots = seats, slots
        # A tensor made in inference mode could not be written to outside of it. Zeros, because a hidden slot must be finite.
        with torch.inference_mode(False), torch.no_grad():
            self.memory = like.planes().new_zeros((planes, heads, seats, slots + 1, dim))
            self._views = [self.memory[:, :, seat, :slots] for seat in range(seats)]
        self._owners: list[ref[TorchCache] | None] = [None] * seats
        self._order = list(range(seats))  # the least recently used first

    def assign(self, caches: Sequence[TorchCache]) -> list[int]:
        """The seat of each cache, at most as many as there are seats. Who has none gets the lowest free one, or the one least used."""
        owners = [self._owner(seat) for seat in range(self.seats)]
        held = [
            next((seat for seat, owner in enumerate(owners) if owner is cache), None)
            for cache in caches
        ]
        free = [seat for seat, owner in enumerate(owners) if owner is None]
        spare = iter(
            [*free, *(seat for seat in self._order if seat not in free and seat not in held)]
        )
        found = [
            self._assign(cache, next(spare)) if seat is None else seat
            for cache, seat in zip(caches, held, strict=True)
        ]
        self._order = [*(seat for seat in self._order if seat not in found), *found]
        return found

    def _owner(self, seat: int) -> TorchCache | None:
        """Who sits there; nobody where the text is gone or has moved out."""
        known = self._owners[seat]
        cache = None if known is None else known()
        return cache if cache is not None and cache.planes() is self._views[seat] else None

    def _assign(self, cache: TorchCache, seat: int) -> int:
        owner = self._owner(seat)
        if owner is not None:
            move_out(owner)
        move_in(cache, self._views[seat])
        self._owners[seat] = ref(cache)
        return seat


def move_in(cache: TorchCache, planes: torch.Tensor) -> None:
    """From now on the cache is in `planes`, which has room for it. Slots of this pass (from `cache.start` on) are yet to be written."""
    with torch.no_grad():
        planes[:, :, : cache.start] = cache.planes()[:, :, : cache.start]
        # What another text left there might not be finite, and a hidden slot counts 0 times its values.
        planes[:, :, cache.start :] = 0
    places = np.zeros(planes.shape[2], dtype=np.int64)
    places[: cache.length] = cache.positions
    (shape,) = cache._planes
    cache._planes[shape], cache._child_entries = planes, places


def move_out(cache: TorchCache) -> None:
    """Into memory of its own."""
    cache._grow(min(cache.capacity, max(cache.length, INITIAL_SLOTS)))
