"""Match-then-emit: for every draft, the tokens are those the target would write one by one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.core.accepted_path import AcceptedPath, accept_path, accept_path_by_row
from runtime.core.tree import TokenTree

SMALL = st.integers(0, 2)


def follows(text: tuple[int, ...]) -> int:
    """A target: the token it chooses after each text."""
    return hash((7, *text)) % 3


@given(st.lists(st.tuples(st.integers(0, 30), SMALL), max_size=30), st.integers(0, 30))
def test_tokens_are_the_targets_own_for_any_tree_and_any_part_of_it(
    growth: list[tuple[int, int]], rows: int
) -> None:
    tree = TokenTree(1, 0, 64, 8)
    for place, token in growth:
        tree.add(place % len(tree), token, -0.5)
    nodes = tree.best_nodes(rows)
    texts = [(), *(tuple(tree.tokens_to(node)) for node in nodes)]
    accepted = accept_path(tree, nodes, [follows(text) for text in texts])
    written: tuple[int, ...] = ()
    while written in texts:
        written = (*written, follows(written))
    assert (*(tree.token[node] for node in accepted.path), accepted.token) == written
    asked: list[tuple[int, ...]] = []

    def choose(row: int) -> int:
        asked.append(texts[row])
        return follows(texts[row])

    assert accept_path_by_row(tree, nodes, choose) == accepted
    assert asked == [written[:n] for n in range(len(written))]
    assert set(accepted.path) <= set(nodes)


@pytest.mark.parametrize(
    ("nodes", "choices", "accepted"),
    [
        ([], [5], AcceptedPath((), 5)),
        ([1], [5, 7], AcceptedPath((1,), 7)),
        ([1], [6, 7], AcceptedPath((), 6)),  # a child that was not verified is not followed
        ([1, 2], [6, 7, 9], AcceptedPath((2,), 9)),
        ([1, 2, 3], [5, 8, 9, 4], AcceptedPath((1, 3), 4)),
        ([1, 3], [5, 8, 4], AcceptedPath((1, 3), 4)),
        ([1, 3], [9, 8, 4], AcceptedPath((), 9)),
    ],
)
def test_the_descent(nodes: list[int], choices: list[int], accepted: AcceptedPath) -> None:
    tree = TokenTree(1, 0, 64, 8)
    assert [tree.add(0, 5, -0.1), tree.add(0, 6, -0.2), tree.add(1, 8, -0.1)] == [1, 2, 3]
    assert accept_path(tree, nodes, choices) == accepted
