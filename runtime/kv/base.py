"""What a cache promises, whatever it stores."""

from collections.abc import Sequence
from typing import Protocol


class KVCache(Protocol):
    """Slots 0 .. length-1 of one text: first a contiguous prefix, behind it the rows of a tree in any order.

    After any sequence of calls, reading the slots of a path gives what a fresh prefill of that path would give.
    """

    @property
    def length(self) -> int:
        """Slots in use."""
        ...

    @property
    def room(self) -> int:
        """Slots for which memory is taken: at least `length`."""
        ...

    def append(self, rows: int) -> int:
        """Make room for `rows` more slots; returns the first. Raises InvalidRequest beyond the capacity."""
        ...

    def keep(self, prefix: int, slots: Sequence[int]) -> None:
        """Keep [0, prefix) and, moved behind it in this order, `slots` (each at least `prefix`, none twice).

        All others are free afterwards. Raises IndexError for a slot that is not in use.
        """
        ...

    def fork(self, length: int) -> "KVCache":
        """A cache of its own that begins with a copy of slots [0, length). Raises IndexError as `truncate` does."""
        ...

    def truncate(self, length: int) -> None:
        """Forget all slots from `length` on. Raises IndexError where `length` is above the present length."""
        ...
