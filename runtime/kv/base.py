"""The interface of a key-value cache, whatever it stores."""

from collections.abc import Sequence
from typing import Protocol


class KVCache(Protocol):
    """Slots 0 .. length-1 of one text: a contiguous prefix, then rows of a tree in any order.

    After any sequence of calls the slots of a path read as a fresh prefill of that path would.
    """

    @property
    def length(self) -> int:
        """Slots in use."""
        ...

    @property
    def room(self) -> int:
        """Slots with allocated memory: at least `length`."""
        ...

    def append(self, rows: int) -> int:
        """Add `rows` slots and return the first. Raises InvalidRequest beyond the capacity."""
        ...

    def keep(self, prefix: int, slots: Sequence[int]) -> None:
        """Keep [0, prefix), followed by `slots` in this order, and free all others.

        Each slot is at least `prefix` and listed once. Raises IndexError for a slot that is not in
        use.
        """
        ...

    def fork(self, length: int) -> "KVCache":
        """Return a new cache with a copy of slots [0, length). Raises IndexError as `truncate`
        does.
        """
        ...

    def truncate(self, length: int) -> None:
        """Free all slots from `length` on. Raises IndexError if `length` exceeds the current
        length.
        """
        ...
