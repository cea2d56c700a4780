"""Chooses the nodes to expand next, best first, within shares of trees and a budget of rows."""

from collections.abc import Sequence
from itertools import islice

from runtime.core.messages import Share
from runtime.core.tree import TokenTree

WHOLE_TREE = Share("", 0, 1)


class Frontier:
    """The expandable nodes of one tree, most probable first, kept sorted while the tree grows.

    A node is expandable if it has not been expanded here, is not another drafter's, has a path
    score of at least `floor`, and its children would not be deeper than `deepest`. Of equal nodes
    the older comes first. Make a new frontier after a re-root.

    The main line is the root, its first child, that node's first child, and so on; all drafters
    grow it. Any other node belongs to the drafter selected by the key of its branch, its first
    ancestor off the main line.
    """

    def __init__(
        self, tree: TokenTree, deepest: int, floor: float, share: Share = WHOLE_TREE
    ) -> None:
        self.tree, self.deepest, self.floor, self.share = tree, deepest, floor, share
        self.owners: list[int | None] = [None]  # of each node seen so far; None on the main line
        self.expandable: list[tuple[float, int]] = []  # (-path score, node)
        self._take(0)
        self.extend()

    def extend(self) -> None:
        """Process the nodes added to the tree since the last call."""
        tree, owners, of = self.tree, self.owners, self.share.of
        before = len(self.expandable)
        for node in range(len(owners), len(tree)):
            owner = owners[tree.parent[node]]
            if owner is None and tree.rank[node] > 0:
                owner = tree.key[node] % of
            owners.append(owner)
            self._take(node)
        if len(self.expandable) > before:
            self.expandable.sort()

    def _take(self, node: int) -> None:
        tree, path, owner = self.tree, self.tree.path[node], self.owners[node]
        if (
            path >= self.floor
            and tree.depth[node] < self.deepest
            and not tree.expanded[node]
            and owner in (None, self.share.index)
        ):
            self.expandable.append((-path, node))

    def best(self, count: int) -> list[int]:
        """Return the first `count` nodes, or all if there are fewer."""
        return [node for _, node in self.expandable[:count]]

    def drop_expanded(self) -> None:
        """Remove nodes that have been expanded."""
        self.expandable = [entry for entry in self.expandable if not self.tree.expanded[entry[1]]]


def allocate_rows(frontiers: Sequence[Frontier], widths: Sequence[int], rows: int) -> list[int]:
    """Return how many nodes of each frontier to expand in one pass over all of them.

    Each non-empty frontier gets one; the rest goes to the most probable nodes of all, at most
    widths[i] of frontier i and `rows` in total.
    """
    counts = [min(1, len(frontier.expandable)) for frontier in frontiers]
    others = [
        (path, i)
        for i, frontier in enumerate(frontiers)
        for path, _ in islice(frontier.expandable, 1, widths[i])
    ]
    for _, i in sorted(others)[: max(0, rows - sum(counts))]:
        counts[i] += 1
    return counts
