"""Rows by marginal gain across sessions, patience by the long-run rate.

    rows   the n that maximises E(n) - rate * T(n),  E(n) = one token per session + the n highest path probabilities of all
    wait   while the next growth of the only session is expected to bring twice what the target earns meanwhile:
           promise * (sum of the path probabilities of the leaves that it will expand) > 2 * rate * time

Simulated with steps 3 to 40 times as long as a drafter's, the factor 2 is better than 1 by up to a tenth and than 3 by as much;
with two sessions or more, not to wait is better than either.

T(n) is measured at start and corrected by the steps themselves: those of the widths in use, by the ratio of what was seen to what was
expected, and one that the machine held up counts as twice as long. Widths out of use go back to what was measured at start, or below that
as far as those in use are faster now: else whatever was once seen to be slow would never be tried again. `rate` is the long-run tokens
per second.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from runtime.core.messages import DEFAULT_STYLE, Round
from runtime.schedulers.base import Plan, SessionView

MEASURED_ROWS = (
    1,
    2,
    4,
    8,
    16,
    17,
    32,
    33,
    64,
)  # of a pass for which T is measured; kernels work in tiles of 16 rows
MAX_STEP_NODES = 64  # nodes verified in one pass
STEP_EWMA_WEIGHT = 0.05  # weight of a new observation
PASS_TIME_EWMA_WEIGHT = 0.2  # the same for T: a shared machine is slower by half from one second to the next, and every row is paid for at that price
MAX_SLOWDOWN = 2.0  # times what was expected, as which a step counts that took longer
RECOVERY_WEIGHT = 0.01  # the weight of what was measured at start, for widths out of use
LATE_FACTOR = 2.0  # times its usual delay: growth that has not come by then is not waited for
INITIAL_WIDTH = 4.0  # leaves that a drafter is taken to expand at once, until some growth was seen
WAIT_MARGIN = 2.0  # tokens gained per token forgone that waiting must exceed: much of what is waited for comes during the step anyway


class Living:
    """See Scheduler. `times`: seconds of a pass by its rows, for some numbers of rows, 1 among them."""

    style = DEFAULT_STYLE

    def __init__(self, times: Mapping[int, float]) -> None:
        self.rows = np.asarray(sorted(times), dtype=np.float64)
        self.measured = np.asarray([times[int(rows)] for rows in self.rows])
        self.seen = self.measured.copy()
        self.tokens, self.seconds = 1.0, float(self.measured[0])  # moving averages, of a step
        self.width = INITIAL_WIDTH
        self.delay: dict[bool, float | None] = {
            True: None,
            False: None,
        }  # of the first growth after a commit, of others

    @property
    def rate(self) -> float:
        """Tokens per second of all sessions together, over many steps."""
        return self.tokens / self.seconds

    @property
    def times(self) -> npt.NDArray[np.float64]:
        """T of the measured widths, which never falls from one to the next."""
        return np.maximum.accumulate(self.seen)

    def plan(self, views: Sequence[SessionView]) -> Plan:
        wait = self.wait_seconds(views)
        return Plan((0,) * len(views), wait) if wait > 0.0 else Plan(self.allocate_rows(views))

    def allocate_rows(self, views: Sequence[SessionView]) -> tuple[int, ...]:
        """Rows for each session: the best nodes of all of them, as many as pay for the time that they add to the pass."""
        gains = np.concatenate([view.gains[:MAX_STEP_NODES] for view in views])
        owners = np.repeat(
            np.arange(len(views)), [min(MAX_STEP_NODES, len(view.gains)) for view in views]
        )
        order = np.argsort(-gains, kind="stable")[:MAX_STEP_NODES]
        times = self.pass_seconds(len(views) + np.arange(len(order) + 1))
        rate = max(
            self.rate, len(views) / times[0]
        )  # plain decoding's is to be had in any case, also when the load has just risen
        value = np.concatenate([[0.0], np.cumsum(gains[order])]) - rate * times
        chosen = owners[order[: int(value.argmax())]]
        return tuple(np.bincount(chosen, minlength=len(views)).tolist())

    def wait_seconds(self, views: Sequence[SessionView]) -> float:
        """Seconds to wait for the next growth; 0 where none is due or it would not pay."""
        if len(views) > 1 or not views[0].drafters:
            return 0.0
        (view,) = views
        # Before any growth was seen half a step: a try, to learn it.
        usual = self.delay[view.growths == 0] or float(self.times[0]) / (2 * LATE_FACTOR)
        left = min(
            LATE_FACTOR * usual - view.since_growth, float(self.times[0]) - view.waited
        )  # a step's time at most, whatever dribbles in
        due = max(usual - view.since_growth, usual / 2)  # what is late is not there the next moment
        promised = view.coverage * float(view.leaves[: max(1, round(self.width))].sum())
        return left if left > 0.0 and promised > WAIT_MARGIN * self.rate * due else 0.0

    def pass_seconds(self, rows: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """T, linear between and beyond the measured widths."""
        n, times = np.asarray(rows, dtype=np.float64), self.times
        inside: npt.NDArray[np.float64] = np.interp(n, self.rows, times)
        if len(self.rows) < 2:
            return inside
        slope = (times[-1] - times[-2]) / (self.rows[-1] - self.rows[-2])
        beyond: npt.NDArray[np.float64] = inside + np.maximum(0.0, n - self.rows[-1]) * slope
        return beyond

    def observe(self, step: Sequence[Round]) -> None:
        if not step:
            return
        one = step[0]  # their times are the same
        self.update_pass_times(sum(done.width + 1 for done in step), one.computed - one.ridden)
        spent = one.waited + one.computed + one.bookkeeping
        self.tokens += STEP_EWMA_WEIGHT * (sum(done.accepted + 1 for done in step) - self.tokens)
        self.seconds += STEP_EWMA_WEIGHT * (max(spent, 1e-9) - self.seconds)

    def update_pass_times(self, rows: int, computed: float) -> None:
        """Move the measured widths on both sides towards what was seen, by their nearness, and all others on their way back."""
        above = min(int(np.searchsorted(self.rows, rows)), len(self.rows) - 1)
        below = max(0, above - 1)
        span = max(1.0, self.rows[above] - self.rows[below])
        near = float(np.clip((rows - self.rows[below]) / span, 0.0, 1.0)) if above != below else 1.0
        used = np.zeros_like(self.rows)
        used[below] += 1.0 - near
        used[above] += near
        self.seen *= min(MAX_SLOWDOWN, max(computed, 1e-9) / float(used @ self.seen)) ** (
            PASS_TIME_EWMA_WEIGHT * used
        )
        back = self.measured * min(1.0, float(used @ self.seen) / float(used @ self.measured))
        self.seen = np.where(
            used > 0.0, self.seen, self.seen * (back / self.seen) ** RECOVERY_WEIGHT
        )

    def on_growth(self, delay: float, first: bool, leaves: int) -> None:
        self.width += STEP_EWMA_WEIGHT * (leaves - self.width)
        old = self.delay[first]
        self.delay[first] = delay if old is None else old + STEP_EWMA_WEIGHT * (delay - old)
