"""The naive twin: always the same number of rows, a fixed patience while there is nothing to verify."""

from dataclasses import dataclass

from runtime.messages import Round
from runtime.schedulers.base import Plan, View


@dataclass(frozen=True, slots=True)
class Fixed:
    rows: int
    patience: float = 0.0  # seconds

    def plan(self, view: View) -> Plan:
        if not view.gains and view.drafters and view.waited < self.patience:
            return Plan(0, self.patience - view.waited)
        return Plan(min(self.rows, len(view.gains)))

    def observe(self, done: Round) -> None:
        pass

    def grew(self, delay: float, hit: bool) -> None:
        pass
