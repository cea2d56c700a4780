"""Which nodes a drafter expands next: best first, within its share of the tree."""

import numpy as np

from runtime.tree import TokenTree


def owners(tree: TokenTree, of: int) -> list[int | None]:
    """For each node the index of the drafter that owns it; None for the main line, which all of `of` drafters grow.

    The main line is the root, its first child, that one's first child, and so on. Every other node belongs to the drafter
    that the name of its branch points to: its first ancestor off the main line.
    """
    found: list[int | None] = [None]
    for node in range(1, len(tree)):
        parent = tree.parent[node]
        inherited = found[parent]
        if inherited is not None:
            found.append(inherited)
        else:
            found.append(None if tree.rank[node] == 0 else tree.key[node] % of)
    return found


def frontier(tree: TokenTree, width: int, index: int, of: int, deepest: int, floor: float) -> list[int]:
    """At most `width` nodes that nobody has expanded here, the most probable first.

    Left out are nodes that belong to others, whose children would lie deeper than `deepest`, or whose path score is below
    `floor`.
    """
    owner = owners(tree, of) if of > 1 else []
    ripe = [
        node
        for node in range(len(tree))
        if not tree.expanded[node]
        and tree.depth[node] < deepest
        and tree.path[node] >= floor
        and (not owner or owner[node] is None or owner[node] == index)
    ]
    scores = np.asarray([tree.path[node] for node in ripe])
    return [ripe[i] for i in np.argsort(-scores, kind="stable")[:width]]
