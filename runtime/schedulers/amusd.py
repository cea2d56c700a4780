"""AMUSD: asynchronous multi-device speculative decoding (McDanel, arXiv 2410.17375).

The drafter extends one chain without pause. The target keeps verifying the part of the chain that
has arrived. A rejection rolls both back to the target's token.

Relation to the paper: its target polls the chain in shared memory and starts as soon as the chain
is two tokens longer than the verified text (the authors' code, github.com/BradMcDanel/AMUSD,
amusd.py: it sleeps while the draft's length is at most the verified length plus one), so `least` is
2. Its handshake, in which the target waits until the drafter has seen a rejection, is not needed
here: stale guesses name a parent that is gone, so the tree is empty after a rejection and the
target waits for new guesses anyway. With `least` 0 the target never waits, and decodes plainly
while there are no guesses.
"""

from runtime.core import limits
from runtime.core.messages import Style
from runtime.schedulers.base import SessionView
from runtime.schedulers.blocking import Blocking


class Amusd(Blocking):
    style = Style(width=1, branches=1)

    def __init__(self, t: float, least: int = 2, rows: int = limits.STEP_ROWS) -> None:
        """`t`: see Blocking; `least`: chain length to wait for; `rows`: most nodes verified in a
        step.
        """
        super().__init__(t)
        self.least, self.rows = least, rows

    @property
    def expected_growths(self) -> int:
        return max(1, self.least)

    def needs_growth(self, view: SessionView) -> bool:
        return view.depth < self.least

    def rows_wanted(self, view: SessionView) -> int:
        return self.rows
