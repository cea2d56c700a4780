"""Which nodes a drafter expands next: best first, within its share of each tree and a budget of rows for all of them."""

from collections.abc import Sequence
from itertools import islice

from runtime.core.messages import Share
from runtime.core.tree import TokenTree

WHOLE_TREE = Share("", 0, 1)


class Frontier:
    """The nodes of one tree that may be expanded, the most probable first, kept in order while the tree grows.

    They are those that nobody has expanded here, that do not belong to others, whose children lie no deeper than `deepest`,
    and whose path score is at least `floor`. Of equals the older comes first. To be made anew after a re-root.

    The main line is the root, its first child, that one's first child, and so on: all drafters grow it. Every other node
    belongs to the drafter that the name of its branch points to, its first ancestor off the main line.
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
        """See the nodes that the tree has got since."""
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
        """The `count` first, or all where there are fewer."""
        return [node for _, node in self.expandable[:count]]

    def drop_expanded(self) -> None:
        """Forget the nodes that have been expanded since."""
        self.expandable = [entry for entry in self.expandable if not self.tree.expanded[entry[1]]]


def allocate_rows(frontiers: Sequence[Frontier], widths: Sequence[int], rows: int) -> list[int]:
    """How many nodes of each frontier are expanded in one pass over all of them.

    One of each that has any; beyond that the most probable of all, at most widths[i] of frontier i and `rows` together.
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
