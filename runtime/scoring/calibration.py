"""Maps a drafter's confidence to the observed acceptance.

A small model is badly calibrated at temperature 0: its 0.25 for a first choice may mean 0.7. Nodes
are therefore scored by the outcome of earlier ones of the same kind of drafter, rank (position
among its guesses there) and confidence, at a similar temperature. runtime.scoring.agreement refines
this where drafters of several kinds have guessed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.core.node_keys import Floats, Ints
from runtime.core.tree import TokenTree

MAX_RANKS = 8
BINS = 10
PRIOR_WEIGHT = 8.0  # observations that the drafter's own number is worth
MAX_OBSERVATIONS = 1000.0  # per cell; the counts are then halved, so that a change is noticed
COVERAGE_EWMA_WEIGHT = 0.02  # weight of a new observation
INITIAL_COVERAGE = 0.7  # before anything was observed
MIN_PROBABILITY = 1e-6  # probability


def bin_index(score: float) -> int:
    """Return one of ten bins, finer near certainty: the square root of the probability of error."""
    return min(BINS - 1, int(BINS * math.sqrt(max(0.0, 1.0 - math.exp(score)))))


def table_cells(ranks: Ints, scores: Floats) -> tuple[Ints, Ints]:
    """Return row and column of each score in a table."""
    columns = BINS * np.sqrt(np.maximum(1.0 - np.exp(scores), 0.0))
    return np.minimum(ranks, MAX_RANKS - 1), np.minimum(columns, BINS - 1).astype(np.int64)


class Calibration:
    """Counts by (rank, bin) how often such a child was chosen once its parent was on the path."""

    __slots__ = ("hits", "tries")

    def __init__(self) -> None:
        self.tries = np.zeros((MAX_RANKS, BINS))
        self.hits = np.zeros((MAX_RANKS, BINS))

    def observe(self, rank: int, score: float, taken: bool) -> None:
        cell = min(rank, MAX_RANKS - 1), bin_index(score)
        if self.tries[cell] >= MAX_OBSERVATIONS:
            self.tries[cell] /= 2
            self.hits[cell] /= 2
        self.tries[cell] += 1.0
        self.hits[cell] += taken

    def scores(self, ranks: Ints, scores: Floats) -> Floats:
        """Return log acceptance estimates (n,), at most 0.

        They move from the drafter's own number to the observed rate as observations accumulate.
        """
        kind_of = table_cells(ranks, scores)
        estimates = (self.hits[kind_of] + PRIOR_WEIGHT * np.exp(scores)) / (
            self.tries[kind_of] + PRIOR_WEIGHT
        )
        found: Floats = np.log(np.minimum(np.maximum(estimates, MIN_PROBABILITY), 1.0))
        return found


class TemperatureBucket:
    """Calibrations at one temperature.

    `coverage` is how often the target's choice is among the children of an expanded node.
    """

    __slots__ = ("coverage", "tables")

    def __init__(self) -> None:
        self.tables: dict[str, Calibration] = {}
        self.coverage = INITIAL_COVERAGE

    def table(self, drafter: str, others: str = "") -> Calibration:
        """Return the table for all drafters of this one's kind.

        `others` selects a separate table for shared positions (runtime.scoring.agreement).
        """
        return self.tables.setdefault(drafter_kind(drafter) + others, Calibration())

    def observe_path(self, tree: TokenTree, decided: Sequence[int]) -> None:
        """Count the children of each node on the decided path that come from the kind that guessed
        first.

        That kind was alone when it guessed; later proposals of others are not counted here.
        """
        for node, taken in choices_along(tree, decided):
            if children := tree.children(node):
                first = drafter_kind(tree.drafter[children[0]])
                for child in children:
                    if drafter_kind(tree.drafter[child]) == first:
                        self.table(first).observe(
                            tree.rank[child], tree.raw_logprob[child], child == taken
                        )
                self.coverage += COVERAGE_EWMA_WEIGHT * ((taken is not None) - self.coverage)


def choices_along(tree: TokenTree, decided: Sequence[int]) -> Iterator[tuple[int, int | None]]:
    """Yield the nodes at which the target chose one of these tokens, with the chosen child
    or None.
    """
    node: int | None = 0
    for token in decided:
        if node is None:
            return
        taken = tree.child(node, token)
        yield node, taken
        node = taken


class Calibrations:
    """All temperature buckets of one target or drafter. `to_dict` and `from_dict` are inverse.

    `to_dict` returns plain JSON values. It may run on another thread than the one that observes.
    """

    def __init__(self) -> None:
        self.buckets: dict[str, TemperatureBucket] = {}

    def bucket(self, temperature: float) -> TemperatureBucket:
        return self.buckets.setdefault(f"{temperature:.1f}", TemperatureBucket())

    def to_dict(self) -> dict[str, Any]:
        return {
            name: {
                "promise": bucket.coverage,
                "tables": {
                    drafter_kind: [table.tries.tolist(), table.hits.tolist()]
                    for drafter_kind, table in tuple(bucket.tables.items())
                },
            }
            for name, bucket in tuple(self.buckets.items())
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Calibrations":
        """Raise ValueError, KeyError or TypeError for data that `to_dict` did not make."""
        found = cls()
        for name, bucket in saved.items():
            known = found.bucket(float(name))
            known.coverage = min(1.0, max(0.0, float(bucket["promise"])))
            for drafter, (tries, hits) in bucket["tables"].items():
                table = known.table(drafter)
                table.tries, table.hits = parse_counts(tries), parse_counts(hits)
        return found


def parse_counts(rows: Sequence[Sequence[float]]) -> npt.NDArray[np.float64]:
    found = np.array(rows, dtype=np.float64)
    if found.shape != (MAX_RANKS, BINS) or not (np.isfinite(found) & (found >= 0)).all():
        raise ValueError(f"a calibration table has {MAX_RANKS} rows of {BINS} counts")
    return found


def drafter_kind(drafter: str) -> str:
    """Return the name without its number: drafters NAME-0, NAME-1 of a pool share calibrations."""
    name, dash, number = drafter.rpartition("-")
    return name if dash and number.isdecimal() else drafter
