"""What a scheduling policy decides, from numbers alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from runtime.messages import Round


@dataclass(frozen=True, slots=True)
class View:
    """One session before a step. `gains`: path probabilities of its mirror's nodes, falling; times in seconds."""

    gains: Sequence[float]
    drafters: int  # attached now; 0 where no growth could be used
    hit: bool  # the last commit's new root was a node of the mirror
    waited: float  # in this step so far
    since_commit: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Either wait this many seconds for growth, or (wait 0) step now with so many rows beside the root."""

    rows: int
    wait: float = 0.0


class Scheduler(Protocol):
    def plan(self, view: View) -> Plan:
        """What to do now. Asked again after a wait, or as soon as growth arrives."""
        ...

    def observe(self, done: Round) -> None:
        """Learn from a finished step."""
        ...

    def grew(self, delay: float, hit: bool) -> None:
        """Learn how long after a commit the first growth of a session arrived."""
        ...
