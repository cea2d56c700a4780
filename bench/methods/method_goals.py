"""The goals of the ways to guess, each with the figure that decides it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.methods.method_stats import MethodStats, ratio
from bench.reports.grid import Grid

MODEL = "model"
BESIDE = f"{MODEL} + "

Rows = Mapping[str, MethodStats]  # what was measured of one target at one temperature, by method


@dataclass(frozen=True, slots=True)
class Goal:
    """`find` is None where it was not measured. Met at or above `least`; above it alone where `more`."""

    what: str
    least: float
    find: Callable[[Rows], float | None]
    more: bool = False

    def met(self, value: float) -> bool:
        return value > self.least if self.more else value >= self.least


def beside(*others: str) -> Callable[[Rows], float | None]:
    """The best of these combinations with the model against the model alone; all that there are if none is named."""

    def find(rows: Rows) -> float | None:
        names = [BESIDE + name for name in others] or [
            name for name in rows if name.startswith(BESIDE)
        ]
        found = [ratio(rows[name], rows[MODEL]) for name in names if name in rows and MODEL in rows]
        return max(found, default=None)

    return find


def tokens_per_step(name: str) -> Callable[[Rows], float | None]:
    return lambda rows: rows[name].tokens_per_step if name in rows else None


def above(name: str, other: str) -> Callable[[Rows], float | None]:
    """Tokens per step of the one less those of the other."""
    return lambda rows: (
        rows[name].tokens_per_step - rows[other].tokens_per_step
        if {name, other} <= rows.keys()
        else None
    )


GOALS = (
    Goal("model + token-recycling / model", 0.98, beside("token-recycling")),
    Goal("best combination with the model / model", 1.10, beside()),
    Goal("hidden-transfer: tokens per step alone", 1.4, tokens_per_step("hidden-transfer")),
    Goal("s3d: tokens per step alone", 1.4, tokens_per_step("s3d")),
    Goal(
        "hidden-transfer: tokens per step more than medusa",
        0.0,
        above("hidden-transfer", "medusa"),
        more=True,
    ),
)


def verdicts(by_temperature: Mapping[float, Rows]) -> Grid:
    """A line for each goal, a column for each temperature."""
    lines = []
    for goal in GOALS:
        values = (goal.find(rows) for rows in by_temperature.values())
        cells = (
            "-" if value is None else f"{value:.2f}, {'met' if goal.met(value) else 'missed'}"
            for value in values
        )
        lines.append((goal.what, f"{'above' if goal.more else 'at least'} {goal.least:g}", *cells))
    return Grid(
        "goals", ("goal", "wanted", *(f"temperature {at:g}" for at in by_temperature)), tuple(lines)
    )
