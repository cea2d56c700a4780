"""Guesses as drafting methods and heads return them: nodes that continue a text's tree."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class DraftNodes:
    """New nodes as parallel arrays (n,), parents before their children.

    parents  below `roots` a node of the text's tree, by its index; `roots` + i the i-th of these nodes
    tokens   token ids
    scores   log of the estimated acceptance of a node once its parent is accepted, at most 0
    roots    nodes of the tree that these may hang on; None: all that there are, and none hangs on another of these
    """

    parents: npt.NDArray[np.integer]
    tokens: npt.NDArray[np.integer]
    scores: npt.NDArray[np.floating]
    roots: int | None = None

    def children_of(self, place: int) -> npt.NDArray[np.int64]:
        """The places of those that hang on the node at `place` among these."""
        return (
            np.flatnonzero(self.parents == self.roots + place)
            if self.roots is not None
            else np.empty(0, np.int64)
        )

    def levels(self) -> "list[npt.NDArray[np.int64] | slice]":
        """Return the places of the nodes that hang on the tree, of those that hang on these, and so on.

        Raises ValueError for a node that comes before its parent.
        """
        roots = self.roots
        if roots is None or not (self.parents >= roots).any():
            return [slice(None)]
        found: list[list[int]] = []
        level_of: list[int] = []
        for place, parent in enumerate(self.parents.tolist()):
            if parent - roots >= place:
                raise ValueError(
                    f"node {place} comes before its parent {parent - roots}: give parents first"
                )
            level = level_of[parent - roots] + 1 if parent >= roots else 0
            level_of.append(level)
            while level >= len(found):
                found.append([])
            found[level].append(place)
        return [np.asarray(places) for places in found]


NO_NODES = DraftNodes(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))


def stack(levels: Sequence[DraftNodes], roots: int) -> DraftNodes:
    """Put levels together: the first hangs on the tree, whose nodes are `roots`; the parents of each
    other are places in the level before it, from 0."""
    parents, begin = [levels[0].parents], roots
    for above, level in pairwise(levels):
        parents.append(level.parents + begin)
        begin += len(above.tokens)
    tokens = np.concatenate([level.tokens for level in levels])
    scores = np.concatenate([level.scores for level in levels])
    return DraftNodes(np.concatenate(parents), tokens, scores, roots)
