"""The result of a soak, as a page, as JSON and as a table for the terminal."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.reports.grid import Grid
from bench.soak.growth import QUANTITIES, Growth, Track, block_medians

STORED_POINTS = 720  # of each series in the JSON


@dataclass(frozen=True, slots=True)
class SoakReport:
    """The figures of a soak; times in seconds.

    faults    by role and signal
    answers   right ones, by kind
    wrong     answers that failed or differed, how many
    lines     a line for some of them
    left      what was still open after the traffic had ended
    warm_up   begin of the run that is not judged
    growths   of all processes that lived long enough
    """

    seconds: float
    seed: int
    period: float
    faults: dict[str, int]
    replaced: int
    answers: dict[str, int]
    wrong: int
    lines: tuple[str, ...]
    left: tuple[str, ...]
    warm_up: float
    growths: tuple[Growth, ...]
    tracks: tuple[Track, ...] = field(default=(), repr=False)
    load: float = 0.0

    @property
    def leaks(self) -> list[Growth]:
        return [growth for growth in self.growths if growth.leaks]

    @property
    def judged(self) -> bool:
        """True if the run was long enough to judge growth."""
        return any(growth.goal is not None for growth in self.growths)

    @property
    def passed(self) -> bool:
        """True if every kind of answer came, all were right, nothing is left and nothing grows."""
        return (
            not self.wrong and sum(self.answers.values()) > 0 and not self.left and not self.leaks
        )

    def grid(self) -> Grid:
        verdict = "nothing" if not self.leaks else f"{len(self.leaks)} quantities"
        rows = (
            ("time, of it warm-up", f"{self.seconds / 60:.1f} min, {self.warm_up / 60:.1f} min"),
            ("faults", joined(self.faults)),
            ("actors replaced", str(self.replaced)),
            ("right answers", joined(self.answers)),
            ("failed or different answers", str(self.wrong)),
            ("still open after the end", ", ".join(self.left) or "nothing"),
            ("grows beyond its goal", verdict if self.judged else "not judged: the run is short"),
            ("load of the machine", f"{self.load:.1f}"),
        )
        return Grid("soak", ("what", "result"), rows, ("result",))

    def growth_grid(self) -> Grid:
        columns = ("process", "quantity", "at first", "at last", "per hour", "99.9 %", "goal", "")
        rows = tuple(growth_row(growth) for growth in self.growths)
        return Grid("growth after the warm-up", columns, rows, ("quantity",))

    def markdown(self, picture: str) -> str:
        """Return the page; `picture` is the file name of the plots."""
        parts = [
            "# Soak",
            "Mixed traffic on a served fleet, with a fault in each "
            f"{self.period:g} s. Seed {self.seed}. Targets and drafters that faults never hit are "
            "judged by their growth; those that are hit live too short for it, and are drawn.",
            self.grid().markdown(),
            f"![growth]({picture})",
            "## Growth after the warm-up",
            "Theil and Sen's slopes. A quantity leaks if its slope is over the goal and the "
            "interval is above zero.",
            self.growth_grid().markdown(),
        ]
        if self.lines:
            parts += ["## Wrong answers", *(f"    {line}" for line in self.lines)]
        return "\n\n".join(parts) + "\n"

    def as_json(self) -> dict[str, Any]:
        """Return everything, with at most STORED_POINTS medians of each series."""
        told = {name: getattr(self, name) for name in self.__slots__}
        return told | {
            "passed": self.passed,
            "judged": self.judged,
            "growths": [asdict(growth) | {"leaks": growth.leaks} for growth in self.growths],
            "tracks": [track_json(track) for track in self.tracks],
        }


def growth_row(growth: Growth) -> tuple[str, ...]:
    unit = QUANTITIES[growth.quantity][0]
    name = f"{growth.quantity}, {unit}" if unit else growth.quantity
    slope = growth.slope
    return (
        growth.process,
        name,
        f"{growth.first:.1f}",
        f"{growth.last:.1f}",
        f"{slope.median:+.2f}",
        f"{slope.low:+.2f} to {slope.high:+.2f}",
        "-" if growth.goal is None else f"{growth.goal:g}",
        "leaks" if growth.leaks else "",
    )


def track_json(track: Track) -> dict[str, Any]:
    series = {"times": track.times, **track.values}
    return {
        "process": track.process,
        "pid": track.pid,
        "judged": track.judged,
        **{name: rounded(values) for name, values in series.items()},
    }


def rounded(values: Sequence[float]) -> list[float]:
    return [round(float(value), 3) for value in block_medians(values, STORED_POINTS)]


def joined(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items())) or "none"
