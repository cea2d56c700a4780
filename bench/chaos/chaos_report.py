"""The result of a chaos run, as a table and as JSON."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.reports.grid import Grid

PERCENTILES = (50, 99, 100)


@dataclass(frozen=True, slots=True)
class Gap:
    """A client's wait when its target was hit, in seconds.

    The gap lasts from the fault, or from the last piece if that came later, to the next piece.

    noticed   until the session left the target
    placed    from then until the request reached the target that continued; includes other targets
              that failed meanwhile
    answered  from then until the first piece
    prefill   the part of `answered` spent reading the text, or None if unknown
    cause     name of the signal that hit the target, "" if none did: it was left by mistake
    """

    noticed: float
    placed: float
    answered: float
    prefill: float | None = None
    cause: str = ""

    @property
    def total(self) -> float:
        return self.noticed + self.placed + self.answered


@dataclass(frozen=True, slots=True)
class ChaosReport:
    """The figures of a run; times in seconds.

    blows     faults by role and signal
    returned  from the loss of a member to its return
    load      load average of the machine over one minute
    """

    streams: int
    targets: int
    drafters: int
    seed: int
    seconds: float
    finished: int
    failed: int
    differing: int
    unfinished: int
    tokens: int
    replaced: int
    changes: int
    blows: dict[str, int] = field(default_factory=dict)
    gaps: tuple[Gap, ...] = ()
    returned: tuple[float, ...] = ()
    load: float = 0.0
    wrong: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """True if answers came and none was lost, repeated or changed."""
        return self.failed == self.differing == self.unfinished == 0 < self.finished

    @property
    def left_by_mistake(self) -> int:
        """Number of continuations away from a target that no fault had hit."""
        return sum(not gap.cause for gap in self.gaps)

    def parts(self) -> dict[str, list[float]]:
        """Return the gaps and their parts, by name."""
        read = [gap.prefill for gap in self.gaps if gap.prefill is not None]
        causes = sorted({gap.cause for gap in self.gaps if gap.cause})
        by_cause = {
            f"gap at {cause}": [gap.total for gap in self.gaps if gap.cause == cause]
            for cause in causes
        }
        found = {
            "gap at a target's death": [gap.total for gap in self.gaps],
            **by_cause,
            "noticed": [gap.noticed for gap in self.gaps],
            "placed": [gap.placed for gap in self.gaps],
            "answered": [gap.answered for gap in self.gaps],
            "read in": read,
            "a member's return": list(self.returned),
        }
        return {name: seconds for name, seconds in found.items() if seconds}

    def as_json(self) -> dict[str, Any]:
        parts = {
            name: {f"p{share}": round(percentile(found, share), 3) for share in PERCENTILES}
            for name, found in self.parts().items()
        }
        told = asdict(self) | {
            "gaps": len(self.gaps),
            "left_by_mistake": self.left_by_mistake,
            "returned": len(self.returned),
        }
        return {**told, "parts": parts, "right": self.passed}

    def grid(self) -> Grid:
        parts = [
            (
                f"{name}: p50, p99, longest",
                ", ".join(f"{percentile(found, share):.2f} s" for share in PERCENTILES),
            )
            for name, found in self.parts().items()
        ]
        rows = (
            ("streams, targets, drafters", f"{self.streams}, {self.targets}, {self.drafters}"),
            ("answers", f"{self.finished} of {self.tokens} tokens in {self.seconds:.0f} s"),
            (
                "failed, differing, unfinished",
                f"{self.failed}, {self.differing}, {self.unfinished}",
            ),
            (
                "faults",
                ", ".join(f"{count} {what}" for what, count in sorted(self.blows.items()))
                or "none",
            ),
            ("changes of the number of drafters", str(self.changes)),
            ("actors replaced", str(self.replaced)),
            ("continuations (goal: p99 at most 3 s)", str(len(self.gaps))),
            ("of them away from a target that nothing had hit", str(self.left_by_mistake)),
            *parts,
            ("load of the machine", f"{self.load:.1f}"),
        )
        return Grid("chaos", ("what", "result"), rows, ("result",))


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that is at least as large as `share` percent of the values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * share / 100) - 1)]
