"""Verification by match-then-emit: the output is what the target chose, whatever the drafters proposed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime.core.tree import TokenTree


@dataclass(frozen=True, slots=True)
class AcceptedPath:
    """`path`: the accepted nodes, from the root's child down. `token`: the target's own choice after the last of them."""

    path: tuple[int, ...]
    token: int


def accept_path(tree: TokenTree, nodes: Sequence[int], choices: Sequence[int]) -> AcceptedPath:
    """Descend from the root along the target's choices for as long as they lead to a verified node.

    `choices[0]` is what the target chose after the root, `choices[i + 1]` what it chose after `nodes[i]`. A choice that
    leads nowhere is the last committed token itself: it is never drawn again (cf. SpecInfer's naive sampling, arXiv
    2305.09781), so the output has exactly the target's distribution for any tree.
    """
    return accept_path_by_row(tree, nodes, choices.__getitem__)


def accept_path_by_row(
    tree: TokenTree, nodes: Sequence[int], choose: Callable[[int], int]
) -> AcceptedPath:
    """As match, where a choice is made when it is needed: `choose(row)` is called once for each row on the way down, in order."""
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
