"""From a drafter's confidence to the acceptance that was observed.

A small model is badly calibrated at temperature 0: the 0.25 of its first choice may mean 0.7. Nodes are therefore
scored by what happened to earlier ones of the same drafter, rank (place among its own guesses there) and confidence, at a similar
temperature. Where drafters of several kinds have guessed, runtime.scoring.agreement goes on from here.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.core.node_names import Floats, Ints
from runtime.core.tree import TokenTree

RANKS = 8
BINS = 10
PRIOR = 8.0  # as many observations as the drafter's own number counts for
ENOUGH = 1000.0  # observations of one kind; then old ones count half, so that a change is noticed
MEMORY = 0.02  # weight of a new observation in `promise`
HOPE = 0.7  # `promise` before anything was observed
LEAST = 1e-6  # probability


def bin_of(score: float) -> int:
    """Ten bins, finer near certainty: by the square root of the probability that it is wrong."""
    return min(BINS - 1, int(BINS * math.sqrt(max(0.0, 1.0 - math.exp(score)))))


def cells(ranks: Ints, scores: Floats) -> tuple[Ints, Ints]:
    """Row and column of each in a table."""
    columns = BINS * np.sqrt(np.maximum(1.0 - np.exp(scores), 0.0))
    return np.minimum(ranks, RANKS - 1), np.minimum(columns, BINS - 1).astype(np.int64)


class Calibration:
    """Counts by (rank, bin): how often such a child was the target's choice once its parent was on the path."""

    __slots__ = ("hits", "tries")

    def __init__(self) -> None:
        self.tries = np.zeros((RANKS, BINS))
        self.hits = np.zeros((RANKS, BINS))

    def observe(self, rank: int, score: float, taken: bool) -> None:
        cell = min(rank, RANKS - 1), bin_of(score)
        if self.tries[cell] >= ENOUGH:
            self.tries[cell] /= 2
            self.hits[cell] /= 2
        self.tries[cell] += 1.0
        self.hits[cell] += taken

    def scores(self, ranks: Ints, scores: Floats) -> Floats:
        """Logs (n,) of the estimated acceptance, at most 0: observed where there is enough, the drafter's own number before."""
        kind_of = cells(ranks, scores)
        estimates = (self.hits[kind_of] + PRIOR * np.exp(scores)) / (self.tries[kind_of] + PRIOR)
        found: Floats = np.log(np.minimum(np.maximum(estimates, LEAST), 1.0))
        return found


class Band:
    """What is known at one temperature. `promise`: how often the target's choice is among the children of an expanded node."""

    __slots__ = ("promise", "tables")

    def __init__(self) -> None:
        self.tables: dict[str, Calibration] = {}
        self.promise = HOPE

    def of(self, drafter: str, others: str = "") -> Calibration:
        """The table of all drafters of this one's kind; for guesses beside those of `others`, as runtime.scoring.agreement names it, one apart."""
        return self.tables.setdefault(kind(drafter) + others, Calibration())

    def observe_path(self, tree: TokenTree, decided: Sequence[int]) -> None:
        """Every node that the decided tokens pass, the root first, has seen one choice of the target: count its children by the kind that
        came first. It was alone then, whatever others have guessed since; these are not counted here."""
        for node, taken in passed(tree, decided):
            if children := tree.children(node):
                first = kind(tree.drafter[children[0]])
                for child in children:
                    if kind(tree.drafter[child]) == first:
                        self.of(first).observe(tree.rank[child], tree.said[child], child == taken)
                self.promise += MEMORY * ((taken is not None) - self.promise)


def passed(tree: TokenTree, decided: Sequence[int]) -> Iterator[tuple[int, int | None]]:
    """The nodes at which the target has chosen one of these tokens, each with the child that has it; None where there is none."""
    node: int | None = 0
    for token in decided:
        if node is None:
            return
        taken = tree.child(node, token)
        yield node, taken
        node = taken


class Calibrations:
    """All bands of one target or drafter. `saved` and `restored` are inverse; what is saved is plain JSON.

    `saved` may be called by another thread than the one that observes.
    """

    def __init__(self) -> None:
        self.bands: dict[str, Band] = {}

    def band(self, temperature: float) -> Band:
        return self.bands.setdefault(f"{temperature:.1f}", Band())

    def saved(self) -> dict[str, Any]:
        return {
            name: {
                "promise": band.promise,
                "tables": {
                    kind: [table.tries.tolist(), table.hits.tolist()]
                    for kind, table in tuple(band.tables.items())
                },
            }
            for name, band in tuple(self.bands.items())
        }

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> "Calibrations":
        """Raises ValueError, KeyError or TypeError for what was not made by `saved`."""
        found = cls()
        for name, band in saved.items():
            known = found.band(float(name))
            known.promise = min(1.0, max(0.0, float(band["promise"])))
            for drafter, (tries, hits) in band["tables"].items():
                table = known.of(drafter)
                table.tries, table.hits = counts(tries), counts(hits)
        return found


def counts(rows: Sequence[Sequence[float]]) -> npt.NDArray[np.float64]:
    found = np.array(rows, dtype=np.float64)
    if found.shape != (RANKS, BINS) or not (np.isfinite(found) & (found >= 0)).all():
        raise ValueError(f"a calibration table has {RANKS} rows of {BINS} counts")
    return found


def kind(drafter: str) -> str:
    """The name without its number: drafters NAME-0, NAME-1 of one pool share what is known of them."""
    name, dash, number = drafter.rpartition("-")
    return name if dash and number.isdecimal() else drafter
