"""Allocates rows by marginal gain across sessions, and waits by the long-run rate.

    rows   the n that maximises E(n) - rate * T(n); E(n) = one token per session + the sum of the
           n highest path probabilities of all sessions
    wait   while the next growth of the only session is expected to add twice the tokens that the
           target produces meanwhile: response * coverage * (sum of the path probabilities of the
           leaves that will be expanded) > 2 * rate * time; response is how often growth comes

In simulations with steps 3 to 40 times as long as a drafter's, the factor 2 is better than 1 by up
to a tenth, and than 3 by as much. With two sessions or more, not waiting is better than either.

T(n) is measured at start and corrected by the steps themselves. Widths in use follow the ratio of
measured to expected times; a step delayed by the machine counts as at most twice as long. Unused
widths drift back to the times measured at start, or below them if the widths in use are faster now;
otherwise a width that was slow once would never be tried again. `rate` is the long-run tokens per
second.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.core.messages import DEFAULT_STYLE, Round
from runtime.schedulers.base import Plan, SessionView
from runtime.scoring.speculation_gate import SpeculationGate

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
)  # T is measured for these; kernels work in tiles of 16 rows
MAX_STEP_NODES = 64  # nodes verified in one pass
STEP_EWMA_WEIGHT = 0.05  # weight of a new observation
PASS_TIME_EWMA_WEIGHT = 0.2  # large: a shared machine slows by half within a second
MAX_SLOWDOWN = 2.0  # cap on measured over expected time of a step
RECOVERY_WEIGHT = 0.01  # of the time measured at start, for unused widths
RESPONSE_EWMA_WEIGHT = 0.1  # a drafter that has nothing to say is soon not waited for
LATE_FACTOR = 2.0  # growth later than this many usual delays is not waited for
INITIAL_WIDTH = 4.0  # leaves that a drafter is assumed to expand at once
# Tokens gained per token forgone that waiting must exceed: much of the growth would arrive during
# the step anyway.
WAIT_MARGIN = 2.0


class Living:
    """See Scheduler. `times` maps numbers of rows, 1 among them, to the seconds of a pass."""

    style = DEFAULT_STYLE

    def __init__(self, times: Mapping[int, float]) -> None:
        self.gate = SpeculationGate(times)
        self.rows = np.asarray(sorted(times), dtype=np.float64)
        self.measured = np.asarray([times[int(rows)] for rows in self.rows])
        self.seen = self.measured.copy()
        self.tokens, self.seconds = 1.0, float(self.measured[0])  # moving averages, of a step
        self.width = INITIAL_WIDTH
        self.response = 1.0  # how often growth comes in a step that waits for it
        self.grown = False  # in this step
        self.delay: dict[bool, float | None] = {
            True: None,
            False: None,
        }  # of the first growth after a commit, of others

    def to_dict(self) -> dict[str, Any]:
        """Return what was learned as plain JSON values; times relative to those at start."""
        return {
            "gate": self.gate.to_dict(),
            "slowdown": dict(
                zip(
                    map(str, self.rows.astype(int)),
                    (self.seen / self.measured).tolist(),
                    strict=True,
                )
            ),
            "tokens": self.tokens,
            "seconds": self.seconds / float(self.measured[0]),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Begin with what `to_dict` has returned in an earlier process.

        Raises ValueError, KeyError, TypeError or AttributeError for anything else.
        """
        slowdown = np.array([float(saved["slowdown"][str(int(rows))]) for rows in self.rows])
        tokens, seconds = float(saved["tokens"]), float(saved["seconds"])
        if not (np.isfinite(slowdown).all() and 1.0 <= tokens < 1e3 and 0.0 < seconds < 1e3):
            raise ValueError("a step's tokens and times are positive numbers")
        self.gate.restore(saved["gate"])
        self.seen = self.measured * np.clip(slowdown, 1.0 / MAX_SLOWDOWN, MAX_SLOWDOWN)
        self.tokens, self.seconds = tokens, seconds * float(self.measured[0])

    @property
    def rate(self) -> float:
        """Return the tokens per second of all sessions together, over many steps."""
        return self.tokens / self.seconds

    @property
    def times(self) -> npt.NDArray[np.float64]:
        """Return T of the measured widths, made monotonic."""
        return np.maximum.accumulate(self.seen)

    def plan(self, views: Sequence[SessionView]) -> Plan:
        wait = self.wait_seconds(views)
        return Plan((0,) * len(views), wait) if wait > 0.0 else Plan(self.allocate_rows(views))

    def allocate_rows(self, views: Sequence[SessionView]) -> tuple[int, ...]:
        """Return the rows of each session: the best nodes of all, while they pay for the time they
        add.
        """
        gains = np.concatenate([view.gains[:MAX_STEP_NODES] for view in views])
        owners = np.repeat(
            np.arange(len(views)), [min(MAX_STEP_NODES, len(view.gains)) for view in views]
        )
        order = np.argsort(-gains, kind="stable")[:MAX_STEP_NODES]
        times = self.pass_seconds(len(views) + np.arange(len(order) + 1))
        # Plain decoding is always possible, also when the load has just risen.
        rate = max(self.rate, len(views) / times[0])
        value = np.concatenate([[0.0], np.cumsum(gains[order])]) - rate * times
        chosen = owners[order[: int(value.argmax())]]
        return tuple(np.bincount(chosen, minlength=len(views)).tolist())

    def wait_seconds(self, views: Sequence[SessionView]) -> float:
        """Return the seconds to wait for the next growth; 0 if none is due or waiting does
        not pay.
        """
        if len(views) > 1 or not views[0].drafters:
            return 0.0
        (view,) = views
        # Before any growth, wait for half a step, to measure the delay.
        usual = self.delay[view.growths == 0] or float(self.times[0]) / (2 * LATE_FACTOR)
        # At most the time of a step in total
        left = min(LATE_FACTOR * usual - view.since_growth, float(self.times[0]) - view.waited)
        due = max(usual - view.since_growth, usual / 2)  # late growth is not imminent either
        promised = (
            self.response * view.coverage * float(view.leaves[: max(1, round(self.width))].sum())
        )
        return left if left > 0.0 and promised > WAIT_MARGIN * self.rate * due else 0.0

    def pass_seconds(self, rows: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return T, linear between and beyond the measured widths."""
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
        if one.waited or self.grown:
            self.response += RESPONSE_EWMA_WEIGHT * (self.grown - self.response)
        self.grown = False
        spent = one.waited + one.computed + one.bookkeeping
        self.tokens += STEP_EWMA_WEIGHT * (sum(done.accepted + 1 for done in step) - self.tokens)
        self.seconds += STEP_EWMA_WEIGHT * (max(spent, 1e-9) - self.seconds)

    def update_pass_times(self, rows: int, computed: float) -> None:
        """Move the neighbouring measured widths towards the observed time, and all others back."""
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
        self.grown = True
        self.width += STEP_EWMA_WEIGHT * (leaves - self.width)
        old = self.delay[first]
        self.delay[first] = delay if old is None else old + STEP_EWMA_WEIGHT * (delay - old)
