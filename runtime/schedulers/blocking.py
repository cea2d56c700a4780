"""What schedules that wait for their drafter have in common: they say what they lack, and patience ends.

Their papers assume a drafter that always answers. Here it may be late, silent or dead, or have nothing left to guess near the
end of the text, so each waits a multiple of the usual time at most, and then verifies what is there.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from runtime.core.messages import Round
from runtime.schedulers.base import Plan, SessionView

DELAY_EWMA_WEIGHT = 0.1  # weight of a new observation
MAX_DELAY_RATIO = 1.5  # times the usual delay that an observation counts at most: some spans hold a rest of the drafter
PATIENCE_FACTOR = 4.0  # how many times the usual delay a step waits for the next growth, and in all


class Blocking(ABC):
    """Of several sessions, each step serves all: it waits while any of them lacks something and is still patient.

    The papers treat one session at a time; this is the plainest reading for several, and the slowest drafter sets the pace of all.
    """

    def __init__(self, t: float) -> None:
        """`t`: seconds of a drafter's forward pass, more than 0: the delay expected of growth until some has been seen."""
        self.first = self.gap = self.step = (
            t  # from a miss to growth, from growth to growth, of a target's step
        )

    @property
    @abstractmethod
    def expected_growths(self) -> int:
        """How many messages of growth a step waits for, at most."""

    @abstractmethod
    def needs_growth(self, view: SessionView) -> bool:
        """Whether the session should not be verified yet."""

    @abstractmethod
    def rows_wanted(self, view: SessionView) -> int:
        """Rows beside the root, were there enough nodes."""

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
        """Seconds still to wait for the session's next growth. A drafter that dribbles what nobody lacks gets no more time in all than
        one that brings what it should.

        As long as its tree is empty at least so many steps of the target: a drafter slower than expected would otherwise
        never be heard, every guess being stale on arrival.
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
