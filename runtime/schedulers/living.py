"""Rows by marginal gain, patience by the long-run rate.

    rows   the n that maximises E(n) - rate * T(n),  E(n) = 1 + the n highest path probabilities
    wait   only while the gain expected from it beats rate * time

T(n) is learned from the steps themselves; `rate` is the moving average of tokens per second.
"""

from runtime.messages import Round
from runtime.schedulers.base import Plan, View

WIDTHS = (0, 1, 2, 4, 8, 16, 32, 64)  # rows beside the root, for which T is kept
GUESS = 0.06  # growth of T with each doubling of the width, until it is measured
MEMORY = 0.1  # weight of a new observation
EXPLORE = 1.5  # how many times the usual delay of growth a step may wait


class Living:
    """One instance per target; sessions share what it has learned."""

    def __init__(self) -> None:
        self.times: dict[int, float] = {}  # width -> seconds
        self.rate = 0.0  # tokens per second
        self.delay = {True: 0.0, False: 0.0}  # from a commit to the next growth, after a hit and after a miss
        self.gain = 1.0  # tokens that a step with drafted rows brings beyond its first

    def plan(self, view: View) -> Plan:
        if not view.gains:
            return Plan(0, self._patience(view))
        if self.rate == 0.0:
            return Plan(min(8, len(view.gains)))
        best, rows, expected = -self.rate * self.time(0), 0, 0.0
        for n, gain in enumerate(view.gains[: WIDTHS[-1]], start=1):
            expected += gain
            value = expected - self.rate * self.time(n)
            if value > best:
                best, rows = value, n
        return Plan(rows)

    def _patience(self, view: View) -> float:
        """Seconds still to wait for the first growth after a miss; 0 where no drafter is there or it does not pay."""
        usual = self.delay[view.hit]
        left = EXPLORE * usual - view.since_commit
        if view.drafters == 0 or left <= 0.0 or self.gain <= self.rate * usual:
            return 0.0
        return left

    def time(self, width: int) -> float:
        """T(width): measured, or scaled from the nearest narrower width that was; interpolated between, never falling."""
        low, high = WIDTHS[0], WIDTHS[0]
        for candidate in WIDTHS:
            low, high = (candidate, candidate) if candidate <= width else (low, candidate)
            if candidate >= width:
                break
        below, above = self._at(low), self._at(high)
        if high == low:
            return below
        return below + (above - below) * (width - low) / (high - low)

    def _at(self, width: int) -> float:
        time = self.times.get(WIDTHS[0], 0.0)
        for candidate in WIDTHS[1:]:
            if candidate > width:
                break
            time = max(time, self.times.get(candidate, time * (1.0 + GUESS)))
        return time

    def observe(self, done: Round) -> None:
        width = max(w for w in WIDTHS if w <= done.width)
        if width == done.width:
            self.times[width] = blend(self.times.get(width), done.computed)
        spent = done.computed + done.waited + done.bookkeeping
        if spent > 0.0:
            self.rate = blend(self.rate or None, (done.accepted + 1) / spent)
        if done.width:
            self.gain = blend(self.gain, float(done.accepted))

    def grew(self, delay: float, hit: bool) -> None:
        self.delay[hit] = blend(self.delay[hit] or None, delay)


def blend(old: float | None, new: float) -> float:
    return new if old is None else old + MEMORY * (new - old)
