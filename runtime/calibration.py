"""From a drafter's confidence to the acceptance that was observed.

A small model is badly calibrated at temperature 0: the 0.25 of its first choice may mean 0.7. Nodes are therefore
scored by what happened to earlier ones of the same rank (place among its siblings) and confidence.
"""

import math
from collections.abc import Sequence

from runtime.tree import TokenTree

RANKS = 8
BINS = 10
PRIOR = 8.0  # as many observations as the drafter's own number counts for


def bin_of(score: float) -> int:
    """Ten bins, finer near certainty: by the square root of the probability that it is wrong."""
    return min(BINS - 1, int(BINS * math.sqrt(max(0.0, 1.0 - math.exp(score)))))


class Calibration:
    """Counts by (rank, bin): how often such a child was the target's choice once its parent was on the path."""

    __slots__ = ("hits", "tries")

    def __init__(self) -> None:
        self.tries = [[0.0] * BINS for _ in range(RANKS)]
        self.hits = [[0.0] * BINS for _ in range(RANKS)]

    def observe(self, rank: int, score: float, taken: bool) -> None:
        row, column = min(rank, RANKS - 1), bin_of(score)
        self.tries[row][column] += 1.0
        self.hits[row][column] += taken

    def score(self, rank: int, score: float) -> float:
        """Log of the estimated acceptance, at most 0: observed where there is enough, the drafter's own number before."""
        row, column = min(rank, RANKS - 1), bin_of(score)
        estimate = (self.hits[row][column] + PRIOR * math.exp(score)) / (self.tries[row][column] + PRIOR)
        return math.log(min(1.0, max(1e-6, estimate)))

    def observe_path(self, tree: TokenTree, decided: Sequence[int]) -> None:
        """Every node that the decided tokens pass, the root first, has seen one choice of the target: count its children."""
        node: int | None = 0
        for token in decided:
            if node is None:
                return
            for child_token, child in tree.children[node].items():
                self.observe(tree.rank[child], tree.said[child], child_token == token)
            node = tree.children[node].get(token)
