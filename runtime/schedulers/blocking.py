"""Common base of schedules that wait for their drafter, with a limit on the wait.

Their papers assume a drafter that always answers. Here it may be late, silent or dead, or have
nothing left to guess near the end of the text. So each schedule waits at most a multiple of the
usual time, and then verifies the nodes it has.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from runtime.core.messages import Round
from runtime.schedulers.base import Plan, SessionView

DELAY_EWMA_WEIGHT = 0.1  # weight of a new observation
MAX_DELAY_RATIO = 1.5  # cap on an observed delay, in usual delays: a drafter may have rested
PATIENCE_FACTOR = 4.0  # limit of a wait in usual delays, per growth and in total


class Blocking(ABC):
    """Each step serves all sessions; it waits while any of them needs growth and may still wait.

    The papers treat one session at a time. This is the plainest extension to several; the slowest
    drafter sets the pace of all.
    """

    gate = None

    def __init__(self, t: float) -> None:
        """`t`: seconds of a drafter's forward pass, more than 0; the expected delay of growth until
        some has been measured.
        """
        self.first = self.gap = self.step = (
            t  # from a miss to growth, from growth to growth, of a target's step
        )

    @property
    @abstractmethod
    def expected_growths(self) -> int:
        """Return how many messages of growth a step waits for, at most."""

    @abstractmethod
    def needs_growth(self, view: SessionView) -> bool:
        """Return True if the session should not be verified yet."""

    @abstractmethod
    def rows_wanted(self, view: SessionView) -> int:
        """Return the rows in addition to the root, if there are enough nodes."""

    def plan(self, views: Sequence[SessionView]) -> Plan:
        rows = tuple(min(self.rows_wanted(view), len(view.gains)) for view in views)
        return Plan(
            rows,
            max(
                (
                    self.wait_seconds(view)
                    for view in views
                    if view.drafters and self.needs_growth(view)
                ),
                default=0.0,
            ),
        )

    def wait_seconds(self, view: SessionView) -> float:
        """Return how long to wait for the session's next growth, in seconds.

        A drafter that sends useless growth in small pieces gets no more time in total than one that
        sends what it should. While the tree is empty, the wait covers at least PATIENCE_FACTOR
        steps of the target: otherwise a drafter slower than expected would never contribute, since
        all its guesses would be stale on arrival.
        """
        usual, since = (
            (self.gap, view.since_growth) if view.growths else (self.first, view.since_commit)
        )
        total = self.first + (self.expected_growths - 1) * self.gap
        if view.depth == 0:
            usual, total = max(usual, self.step), max(total, self.step)
        return max(0.0, min(PATIENCE_FACTOR * usual - since, PATIENCE_FACTOR * total - view.waited))

    def observe(self, step: Sequence[Round]) -> None:
        for done in step[:1]:
            self.step += DELAY_EWMA_WEIGHT * (done.computed - self.step)

    def on_growth(self, delay: float, first: bool, leaves: int) -> None:
        if first:
            self.first = update_delay(self.first, delay)
        else:
            self.gap = update_delay(self.gap, delay)


def update_delay(usual: float, delay: float) -> float:
    return usual + DELAY_EWMA_WEIGHT * (min(delay, MAX_DELAY_RATIO * usual) - usual)
