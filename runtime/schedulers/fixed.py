"""The simplest policy: a fixed number of rows, and a fixed wait while a tree is empty."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from runtime.core.messages import Round, Style
from runtime.schedulers.base import Plan, SessionView


@dataclass(frozen=True, slots=True)
class Fixed:
    rows: int
    patience: float = 0.0  # seconds
    gate: ClassVar[None] = None

    @property
    def style(self) -> Style:
        return Style()

    def plan(self, views: Sequence[SessionView]) -> Plan:
        rows = tuple(min(self.rows, len(view.gains)) for view in views)
        lefts = [
            self.patience - view.waited for view in views if view.drafters and not len(view.gains)
        ]
        return Plan(rows, max([0.0, *lefts]))

    def observe(self, step: Sequence[Round]) -> None:
        pass

    def on_growth(self, delay: float, first: bool, leaves: int) -> None:
        pass
