"""What a run under blows has come to: as a table, and as JSON."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.tables import Grid


@dataclass(frozen=True, slots=True)
class Outcome:
    """Times in seconds. `gaps`: of all sessions that left a target, falling silent for so long; `blows` by role and signal."""

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
    gaps: tuple[float, ...] = ()
    wrong: tuple[str, ...] = ()

    @property
    def right(self) -> bool:
        """Nothing was lost, repeated or changed."""
        return self.failed == self.differing == self.unfinished == 0 < self.finished

    def as_json(self) -> dict[str, Any]:
        gaps = {f"gap_p{share}": round(percentile(self.gaps, share), 3) for share in (50, 90, 99, 100)} if self.gaps else {}
        return {**asdict(self), "gaps": len(self.gaps), **gaps, "right": self.right}

    def grid(self) -> Grid:
        gaps = [f"{percentile(self.gaps, share):.2f} s" for share in (50, 99, 100)] if self.gaps else ["-"] * 3
        within = " (goal: at most 3 s)" if self.gaps else ""
        rows = (
            ("streams, targets, drafters", f"{self.streams}, {self.targets}, {self.drafters}"),
            ("answers", f"{self.finished} of {self.tokens} tokens in {self.seconds:.0f} s"),
            ("failed, differing, unfinished", f"{self.failed}, {self.differing}, {self.unfinished}"),
            ("blows", ", ".join(f"{count} {what}" for what, count in sorted(self.blows.items())) or "none"),
            ("changes of the number of drafters", str(self.changes)),
            ("lives replaced", str(self.replaced)),
            ("continuations", str(len(self.gaps))),
            ("gap at a target's death: median, p99, longest", ", ".join(gaps) + within),
        )
        return Grid("chaos", ("what", "result"), rows, ("result",))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` percent of all are not above."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * share / 100) - 1)]
