"""What schedules that wait for their drafter have in common: they say what they lack, and patience ends.

Their papers assume a drafter that always answers. Here it may be late, silent or dead, or have nothing left to guess near the
end of the text, so each waits a multiple of the usual time at most, and then verifies what is there.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from runtime.core.messages import Round
from runtime.schedulers.base import Plan, View

MEMORY = 0.1  # weight of a new observation
OUTLIER = 1.5  # times the usual delay that an observation counts at most: some spans hold a rest of the drafter
PATIENCE = 4.0  # how many times the usual delay a step waits for the next growth, and in all


class Turns(ABC):
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
    def due(self) -> int:
        """How many messages of growth a step waits for, at most."""

    @abstractmethod
    def lacks(self, view: View) -> bool:
        """Whether the session should not be verified yet."""

    @abstractmethod
    def wanted(self, view: View) -> int:
        """Rows beside the root, were there enough nodes."""

    def plan(self, views: Sequence[View]) -> Plan:
        rows = tuple(min(self.wanted(view), len(view.gains)) for view in views)
        return Plan(
            rows,
            max(
                (self.patience(view) for view in views if view.drafters and self.lacks(view)),
                default=0.0,
            ),
        )

    def patience(self, view: View) -> float:
        """Seconds still to wait for the session's next growth. A drafter that dribbles what nobody lacks gets no more time in all than
        one that brings what it should.

        As long as its tree is empty at least so many steps of the target: a drafter slower than expected would otherwise
        never be heard, every guess being stale on arrival.
        """
        usual, since = (
            (self.gap, view.since_growth) if view.growths else (self.first, view.since_commit)
        )
        total = self.first + (self.due - 1) * self.gap
        if view.depth == 0:
            usual, total = max(usual, self.step), max(total, self.step)
        return max(0.0, min(PATIENCE * usual - since, PATIENCE * total - view.waited))

    def observe(self, step: Sequence[Round]) -> None:
        for done in step[:1]:
            self.step += MEMORY * (done.computed - self.step)

    def on_growth(self, delay: float, first: bool, leaves: int) -> None:
        if first:
            self.first = blend(self.first, delay)
        else:
            self.gap = blend(self.gap, delay)


def blend(usual: float, delay: float) -> float:
    return usual + MEMORY * (min(delay, OUTLIER * usual) - usual)
