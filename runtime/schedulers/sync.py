"""Alternates drafting and verification: each side waits while the other works.

Speculative decoding as first published (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv
2302.01318) is a chain of k: width 1, branches 1, passes k, rows k; a round lasts k*t + T. Trees
drafted level by level (SpecInfer, arXiv 2305.09781; EAGLE-2, arXiv 2406.16858) expand `width`
leaves in each of `passes` passes, with `branches` children each, and verify the best `rows` nodes.
"""

from runtime.core.messages import Style
from runtime.schedulers.base import SessionView
from runtime.schedulers.blocking import Blocking


class Sync(Blocking):
    def __init__(self, width: int, branches: int, passes: int, rows: int, t: float) -> None:
        """`t`: see Blocking. All are at least 1."""
        super().__init__(t)
        self.style = Style(width, branches, passes)
        self.rows = rows

    @property
    def expected_growths(self) -> int:
        return self.style.passes

    def needs_growth(self, view: SessionView) -> bool:
        """Return True until a chain is long enough, counting nodes kept by a re-root, or a tree has
        grown `passes` times.
        """
        if self.style.width == self.style.branches == 1:
            return view.depth < self.style.passes
        return view.growths < self.style.passes

    def rows_wanted(self, view: SessionView) -> int:
        return self.rows
