"""Defines the interface of scheduling policies, which decide from numbers alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from runtime.core.messages import Round, Style
from runtime.scoring.speculation_gate import SpeculationGate


@dataclass(frozen=True, slots=True)
class SessionView:
    """One session before a step; times in seconds.

    gains         path probabilities of verifiable nodes, falling
    leaves        of nodes that may still get children, falling; [1] for an empty tree
    depth         depth of the deepest node
    drafters      number of drafters guessing for it; 0 if no growth could be used
    coverage      how often the target's choice is among the children of an expanded node
    hit           the last commit's new root was a node of the tree
    width         rows in addition to the root in its last step
    waited        time waited in this step so far
    since_commit  time since its last commit, or its first step
    growths       messages of growth since its last commit
    since_growth  time since its last growth, or since its last commit if none has come
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
    """Either wait for growth, at most `wait` seconds, or (`wait` 0) step now with these rows.

    `rows` are in addition to each session's root.
    """

    rows: tuple[int, ...]
    wait: float = 0.0


class Scheduler(Protocol):
    """A scheduling policy, one instance per target. `style` is what it asks of drafters."""

    @property
    def style(self) -> Style: ...

    @property
    def gate(self) -> SpeculationGate | None:
        """Return what makes drafters rest while plain decoding is faster; None: they never do."""
        ...

    def plan(self, views: Sequence[SessionView]) -> Plan:
        """Plan for the sessions that are ready. Called again after a wait, or when growth
        arrives.
        """
        ...

    def observe(self, step: Sequence[Round]) -> None:
        """Learn from a finished step: the rounds of all its sessions, which share its times."""
        ...

    def on_growth(self, delay: float, first: bool, leaves: int) -> None:
        """Learn from the arrival of growth that gave children to `leaves` nodes.

        `delay` is in seconds since the commit before it (`first`) or since the last growth of its
        session.
        """
        ...
