"""The goals of the drafting methods, each with the figure that decides it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.methods.method_stats import MethodStats, median_ratio
from bench.reports.grid import Grid

MODEL = "model"
WITH_MODEL = f"{MODEL} + "

StatsByMethod = Mapping[str, MethodStats]  # of one target at one temperature


@dataclass(frozen=True, slots=True)
class MethodGoal:
    """A goal for a figure.

    `find` returns None if the figure was not measured. The goal is met at `threshold` or above, and
    with `is_strict` only above.
    """

    what: str
    threshold: float
    find: Callable[[StatsByMethod], float | None]
    is_strict: bool = False

    def met(self, value: float) -> bool:
        return value > self.threshold if self.is_strict else value >= self.threshold


def gain_with_model(*others: str) -> Callable[[StatsByMethod], float | None]:
    """Return the best speed-up of these combinations with the model over the model alone.

    Without names, all measured combinations count.
    """

    def find(rows: StatsByMethod) -> float | None:
        names = [WITH_MODEL + name for name in others] or [
            name for name in rows if name.startswith(WITH_MODEL)
        ]
        found = [
            median_ratio(rows[name], rows[MODEL])
            for name in names
            if name in rows and MODEL in rows
        ]
        return max(found, default=None)

    return find


def tokens_per_step(name: str) -> Callable[[StatsByMethod], float | None]:
    return lambda rows: rows[name].tokens_per_step if name in rows else None


def token_gain(name: str, other: str) -> Callable[[StatsByMethod], float | None]:
    """Return the tokens per step of `name` minus those of `other`."""
    return lambda rows: (
        rows[name].tokens_per_step - rows[other].tokens_per_step
        if {name, other} <= rows.keys()
        else None
    )


METHOD_GOALS = (
    MethodGoal("model + token-recycling / model", 0.98, gain_with_model("token-recycling")),
    MethodGoal("best combination with the model / model", 1.10, gain_with_model()),
    MethodGoal("hidden-transfer: tokens per step alone", 1.4, tokens_per_step("hidden-transfer")),
    MethodGoal("s3d: tokens per step alone", 1.4, tokens_per_step("s3d")),
    MethodGoal(
        "hidden-transfer: tokens per step more than medusa",
        0.0,
        token_gain("hidden-transfer", "medusa"),
        is_strict=True,
    ),
)


def goals_grid(by_temperature: Mapping[float, StatsByMethod]) -> Grid:
    """Return a grid with a row per goal and a column per temperature."""
    lines = []
    for goal in METHOD_GOALS:
        values = (goal.find(rows) for rows in by_temperature.values())
        cells = (
            "-" if value is None else f"{value:.2f}, {'met' if goal.met(value) else 'missed'}"
            for value in values
        )
        lines.append(
            (goal.what, f"{'above' if goal.is_strict else 'at least'} {goal.threshold:g}", *cells)
        )
    return Grid(
        "goals", ("goal", "wanted", *(f"temperature {at:g}" for at in by_temperature)), tuple(lines)
    )
