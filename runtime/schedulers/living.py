"""Rows by marginal gain across sessions, patience by the long-run rate.

    rows   the n that maximises E(n) - rate * T(n),  E(n) = one token per session + the n highest path probabilities of all
    wait   while the next growth is expected to bring more tokens than the target earns meanwhile:
           promise * (sum of the path probabilities of the leaves that it will expand) > rate * time

T(n) is measured at start and corrected by the steps themselves; `rate` is the long-run tokens per second.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from runtime.messages import AS_IT_LIKES, Round
from runtime.schedulers.base import Plan, View

ROWS = (1, 2, 4, 8, 16, 17, 32, 33, 64)  # of a pass for which T is measured; kernels work in tiles of 16 rows
MOST = 64  # nodes verified in one pass
MEMORY = 0.05  # weight of a new observation
LATE = 2.0  # times its usual delay: growth that has not come by then is not waited for
WIDTH = 8  # leaves that a drafter is taken to expand at once
MARGIN = 1.0  # tokens gained per token forgone that waiting must exceed


class Living:
    """See Scheduler. `times`: seconds of a pass by its rows, for some numbers of rows, 1 among them."""

    style = AS_IT_LIKES

    def __init__(self, times: Mapping[int, float]) -> None:
        self.rows = np.asarray(sorted(times), dtype=np.float64)
        self.times = np.maximum.accumulate(np.asarray([times[int(rows)] for rows in self.rows]))
        self.tokens, self.seconds = 1.0, float(self.times[0])  # moving averages, of a step
        self.delay: dict[bool, float | None] = {True: None, False: None}  # of the first growth after a commit, of others

    @property
    def rate(self) -> float:
        """Tokens per second of all sessions together, over many steps."""
        return self.tokens / self.seconds

    def plan(self, views: Sequence[View]) -> Plan:
        wait = self.patience(views)
        return Plan((0,) * len(views), wait) if wait > 0.0 else Plan(self.budget(views))

    def budget(self, views: Sequence[View]) -> tuple[int, ...]:
        """Rows for each session: the best nodes of all of them, as many as pay for the time that they add to the pass."""
        gains = np.concatenate([view.gains[:MOST] for view in views])
        owners = np.repeat(np.arange(len(views)), [min(MOST, len(view.gains)) for view in views])
        order = np.argsort(-gains, kind="stable")[:MOST]
        value = np.concatenate([[0.0], np.cumsum(gains[order])]) - self.rate * self.time(len(views) + np.arange(len(order) + 1))
        chosen = owners[order[: int(value.argmax())]]
        return tuple(np.bincount(chosen, minlength=len(views)).tolist())

    def patience(self, views: Sequence[View]) -> float:
        """Seconds to wait for the next growth; 0 where none is due or it would not pay."""
        hopeful = [view for view in views if view.drafters]
        if not hopeful:
            return 0.0
        usual = [self.usual(view) for view in hopeful]
        due = min(max(0.0, delay - view.since_growth) for delay, view in zip(usual, hopeful, strict=True))
        left = max(LATE * delay - view.since_growth for delay, view in zip(usual, hopeful, strict=True))
        leaves = np.sort(np.concatenate([view.promise * view.leaves[:WIDTH] for view in hopeful]))[-WIDTH:]
        return left if left > 0.0 and float(leaves.sum()) > MARGIN * self.rate * due else 0.0

    def usual(self, view: View) -> float:
        """Seconds from a commit, or from the growth before, to the next growth. Before any was seen half a step: a try, to learn it."""
        delay = self.delay[view.growths == 0]
        return float(self.times[0]) / (2 * LATE) if delay is None else delay

    def time(self, rows: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """T, linear between and beyond the measured widths."""
        n = np.asarray(rows, dtype=np.float64)
        inside: npt.NDArray[np.float64] = np.interp(n, self.rows, self.times)
        if len(self.rows) < 2:
            return inside
        slope = (self.times[-1] - self.times[-2]) / (self.rows[-1] - self.rows[-2])
        beyond: npt.NDArray[np.float64] = inside + np.maximum(0.0, n - self.rows[-1]) * slope
        return beyond

    def observe(self, step: Sequence[Round]) -> None:
        if not step:
            return
        one = step[0]  # their times are the same
        self.correct(sum(done.width + 1 for done in step), one.computed)
        spent = one.waited + one.computed + one.bookkeeping
        self.tokens += MEMORY * (sum(done.accepted + 1 for done in step) - self.tokens)
        self.seconds += MEMORY * (max(spent, 1e-9) - self.seconds)

    def correct(self, rows: int, computed: float) -> None:
        """Move the measured widths on both sides towards what was seen, by their nearness; T stays monotone."""
        error = computed - float(self.time(rows))
        above = min(int(np.searchsorted(self.rows, rows)), len(self.rows) - 1)
        below = max(0, above - 1)
        span = max(1.0, self.rows[above] - self.rows[below])
        near = float(np.clip((rows - self.rows[below]) / span, 0.0, 1.0)) if above != below else 1.0
        self.times[above] += MEMORY * near * error
        self.times[below] += MEMORY * (1.0 - near) * error
        self.times = np.maximum(np.maximum.accumulate(self.times), 1e-9)

    def grew(self, delay: float, first: bool) -> None:
        old = self.delay[first]
        self.delay[first] = delay if old is None else old + MEMORY * (delay - old)
