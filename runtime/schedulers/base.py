"""What a scheduling policy decides, from numbers alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from runtime.core.messages import Round, Style


@dataclass(frozen=True, slots=True)
class SessionView:
    """One session before a step; times in seconds.

    gains         path probabilities of the mirror's nodes that could be verified, falling
    leaves        of them, those of the nodes that may still get children, falling; with an empty tree the root's: 1
    depth         of the deepest node
    drafters      that guess for it now; 0 where no growth could be used
    promise       how often the target's choice is among the children of an expanded node
    hit           the last commit's new root was a node of the mirror
    width         rows beside the root in its last step
    waited        in this step so far
    since_commit  since its last commit, or its first step
    growths       messages of growth that have arrived since its last commit
    since_growth  since its last growth arrived, or its last commit where none has since
    """

    gains: npt.NDArray[np.float64]
    leaves: npt.NDArray[np.float64]
    depth: int = 0
    drafters: int = 0
    coverage: float = 0.0
    hit: bool = False
    width: int = 0
    waited: float = 0.0
    since_commit: float = 0.0
    since_growth: float = 0.0
    growths: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """Either wait for growth, at most so many seconds, or (wait 0) step now, with so many rows beside each session's root."""

    rows: tuple[int, ...]
    wait: float = 0.0


class Scheduler(Protocol):
    """One instance per target: sessions share what it has learned. `style` is what its drafters are asked to do."""

    @property
    def style(self) -> Style: ...

    def plan(self, views: Sequence[SessionView]) -> Plan:
        """What to do now with the sessions that are ready. Asked again after a wait, or as soon as growth arrives."""
        ...

    def observe(self, step: Sequence[Round]) -> None:
        """Learn from a finished step: the rounds of all sessions that it served, which share its times."""
        ...

    def on_growth(self, delay: float, first: bool, leaves: int) -> None:
        """Learn after how many seconds growth arrived: since the commit before it (`first`), or since the last growth of its session;
        and how many nodes it gave children to."""
        ...
