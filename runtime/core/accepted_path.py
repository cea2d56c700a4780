"""Verifies by match-then-emit: the output is what the target chose, whatever drafters guess."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime.core.tree import TokenTree


@dataclass(frozen=True, slots=True)
class AcceptedPath:
    """The accepted nodes, from the root's child down, and the target's own token after the last
    one.
    """

    path: tuple[int, ...]
    token: int


def accept_path(tree: TokenTree, nodes: Sequence[int], choices: Sequence[int]) -> AcceptedPath:
    """Descend from the root along the target's choices while they lead to verified nodes.

    `choices[0]` is the target's token after the root, `choices[i + 1]` the one after `nodes[i]`. A
    choice that leads to no node becomes the last committed token and is never drawn again (cf.
    SpecInfer's naive sampling, arXiv 2305.09781), so the output has exactly the target's
    distribution for any tree.
    """
    return accept_path_by_row(tree, nodes, choices.__getitem__)


def accept_path_by_row(
    tree: TokenTree, nodes: Sequence[int], choose: Callable[[int], int]
) -> AcceptedPath:
    """Do the same with choices made on demand: `choose(row)` is called once per row on the path, in
    order.
    """
    row_of = {node: row for row, node in enumerate(nodes, start=1)}
    path: list[int] = []
    node, row = 0, 0
    while True:
        token = choose(row)
        child = tree.child(node, token)
        if child is None or child not in row_of:
            return AcceptedPath(tuple(path), token)
        path.append(child)
        node, row = child, row_of[child]
