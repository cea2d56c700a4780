"""Rows by marginal gain, patience by the long-run rate.

    rows   the n that maximises E(n) - rate * T(n),  E(n) = 1 + the n highest path probabilities
    wait   only while the gain expected from it beats rate * time

T(n) is measured at start and corrected by the steps themselves; `rate` is the moving average of tokens per second.
"""

from collections.abc import Mapping
from itertools import pairwise

from runtime.messages import Round
from runtime.schedulers.base import Plan, View

ROWS = (1, 2, 3, 5, 9, 17, 33)  # of a pass, the root's included, for which T is kept
MEMORY = 0.1  # weight of a new observation
PATIENCE = 1.5  # how many times the usual delay of growth a step may wait


class Living:
    """One instance per target; sessions share what it has learned. `times`: seconds of a pass by its rows, for all of ROWS."""

    def __init__(self, times: Mapping[int, float]) -> None:
        self.times = dict(times)
        self.rate = 1.0 / times[1]  # tokens per second
        self.delay: dict[bool, float | None] = {True: None, False: None}  # from a commit to the next growth, after hit and miss
        self.gain = 1.0  # tokens that a step with drafted rows brings beyond its first

    def plan(self, view: View) -> Plan:
        if not view.gains:
            return Plan(0, self.patience(view))
        best, rows, expected = -self.rate * self.time(0), 0, 0.0
        for n, gain in enumerate(view.gains[: ROWS[-1] - 1], start=1):
            expected += gain
            value = expected - self.rate * self.time(n)
            if value > best:
                best, rows = value, n
        return Plan(rows)

    def patience(self, view: View) -> float:
        """Seconds still to wait for the first growth of a tree; 0 where no drafter is there or it does not pay.

        Before the first growth ever, as long as a plain step takes: without a try nothing would be learned.
        """
        usual = self.delay[view.hit]
        if usual is None:
            usual = self.times[1] / PATIENCE
        left = PATIENCE * usual - view.since_commit
        if view.drafters == 0 or left <= 0.0 or self.gain <= self.rate * usual:
            return 0.0
        return left

    def time(self, nodes: int) -> float:
        """T of a pass over the root and so many nodes: linear between measured widths, never falling with the width."""
        rows, highest = nodes + 1, 0.0
        for low, high in pairwise(ROWS):
            highest = max(highest, self.times[low])
            if rows <= high:
                above = max(highest, self.times[high])
                return highest + (above - highest) * (rows - low) / (high - low)
        return max(highest, self.times[ROWS[-1]])

    def observe(self, done: Round) -> None:
        if done.width + 1 in self.times:
            self.times[done.width + 1] = blend(self.times[done.width + 1], done.computed)
        spent = done.computed + done.waited + done.bookkeeping
        if spent > 0.0:
            self.rate = blend(self.rate, (done.accepted + 1) / spent)
        if done.width:
            self.gain = blend(self.gain, float(done.accepted))

    def grew(self, delay: float, hit: bool) -> None:
        self.delay[hit] = blend(self.delay[hit], delay)


def blend(old: float | None, new: float) -> float:
    return new if old is None else old + MEMORY * (new - old)
