"""Memory at fixed addresses for the keys and values of a few texts, as recorded passes need it.

A text that takes a seat moves into the arena. Its TorchCache keeps working on a view of the arena:
it appends, keeps, truncates and forks with the same code. If another text needs the seat, or the
text outgrows it, the text moves out into its own memory.
"""

from collections.abc import Sequence
from weakref import ref

import numpy as np
import torch

from runtime.kv.store import INITIAL_SLOTS, TorchCache


class Arena:
    """Seats of `slots` slots each, for caches whose layers all have the shape of those of `like`.

    memory  (planes, heads, seats, slots + 1, dim); padding rows are written to the last slot of a
            seat, which no text reads
    """

    def __init__(self, like: TorchCache, seats: int, slots: int) -> None:
        planes, heads, _, dim = like.planes().shape
        self.seats, self.slots = seats, slots
        # A tensor made in inference mode is read-only outside of it. Zeros keep hidden slots
        # finite.
        with torch.inference_mode(False), torch.no_grad():
            self.memory = like.planes().new_zeros((planes, heads, seats, slots + 1, dim))
            self._views = [self.memory[:, :, seat, :slots] for seat in range(seats)]
        self._owners: list[ref[TorchCache] | None] = [None] * seats
        self._order = list(range(seats))  # least recently used first

    def assign(self, caches: Sequence[TorchCache]) -> list[int]:
        """Return the seat of each cache, for at most as many caches as there are seats.

        A cache without a seat gets the lowest free one, or the least recently used one.
        """
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
        """Return the cache in a seat, or None if it is gone or has moved out."""
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
    """Move a cache into `planes`, which has room for it.

    The slots of the current pass, from `cache.start` on, are written later.
    """
    with torch.no_grad():
        planes[:, :, : cache.start] = cache.planes()[:, :, : cache.start]
        # Leftovers of another text may not be finite, and a hidden slot adds 0 times its values.
        planes[:, :, cache.start :] = 0
    places = np.zeros(planes.shape[2], dtype=np.int64)
    places[: cache.length] = cache.positions
    (shape,) = cache._planes
    cache._planes[shape], cache._child_entries = planes, places


def move_out(cache: TorchCache) -> None:
    """Move a cache into its own memory."""
    cache._grow(min(cache.capacity, max(cache.length, INITIAL_SLOTS)))
