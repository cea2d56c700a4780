"""Holds the output of drafting methods and heads: nodes that continue the tree of a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class DraftNodes:
    """New nodes as parallel arrays (n,), parents before their children.

    parents  below `roots`: index of a node in the tree; `roots` + i: the i-th of these nodes
    tokens   token ids
    scores   log of the estimated acceptance once the parent is accepted; at most 0
    roots    number of tree nodes that may be parents; None: all, and no node here is a parent
    """

    parents: npt.NDArray[np.integer]
    tokens: npt.NDArray[np.integer]
    scores: npt.NDArray[np.floating]
    roots: int | None = None

    def children_of(self, place: int) -> npt.NDArray[np.int64]:
        """Return the positions of the children of the node at `place`."""
        return (
            np.flatnonzero(self.parents == self.roots + place)
            if self.roots is not None
            else np.empty(0, np.int64)
        )

    def levels(self) -> "list[npt.NDArray[np.int64] | slice]":
        """Return positions by level: the children of tree nodes, then their children, and so on.

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
    """Combine levels into one. The first hangs on the tree, which has `roots` nodes.

    The parents of every later level are positions in the level before it, from 0.
    """
    parents, begin = [levels[0].parents], roots
    for above, level in pairwise(levels):
        parents.append(level.parents + begin)
        begin += len(above.tokens)
    tokens = np.concatenate([level.tokens for level in levels])
    scores = np.concatenate([level.scores for level in levels])
    return DraftNodes(np.concatenate(parents), tokens, scores, roots)
