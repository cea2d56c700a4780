"""Plain decoding: one token per step, ignoring drafters; the baseline of every speed-up."""

from collections.abc import Sequence

from runtime.core.messages import Round, Style
from runtime.schedulers.base import Plan, SessionView


class Plain:
    style = Style(width=1, branches=1, passes=1)  # the least that drafters can be asked to do
    gate = None

    def plan(self, views: Sequence[SessionView]) -> Plan:
        return Plan((0,) * len(views))

    def observe(self, step: Sequence[Round]) -> None:
        pass

    def on_growth(self, delay: float, first: bool, leaves: int) -> None:
        pass
