"""AMUSD: asynchronous multi-device speculative decoding (McDanel, arXiv 2410.17375).

The drafter runs ahead on one chain without pause; the target verifies the whole of the chain that has arrived, again and again.
A rejection rolls both back to the target's token.

How it maps to the paper. Its target polls the chain in shared memory and starts as soon as that is two tokens longer than the
verified text (the authors' code, github.com/BradMcDanel/AMUSD, amusd.py: it sleeps while the draft's length is at most the
verified length plus one): `least` is 2. Its handshake, in which the target waits until the drafter has seen a rejection, is not
needed where stale guesses name a parent that is gone: the tree is empty after a rejection, so the target waits for new
guesses all the same. With `least` 0 the target never waits, and decodes plainly while nothing is there.
"""

from runtime.core import limits
from runtime.core.messages import Style
from runtime.schedulers.base import SessionView
from runtime.schedulers.blocking import Blocking


class Amusd(Blocking):
    style = Style(width=1, branches=1)

    def __init__(self, t: float, least: int = 2, rows: int = limits.STEP_ROWS) -> None:
        """`t`: see Turns; `least`: tokens of the chain that are waited for; `rows`: of them, the most verified in a step."""
        super().__init__(t)
        self.least, self.rows = least, rows

    @property
    def expected_growths(self) -> int:
        return max(1, self.least)

    def needs_growth(self, view: SessionView) -> bool:
        return view.depth < self.least

    def rows_wanted(self, view: SessionView) -> int:
        return self.rows
