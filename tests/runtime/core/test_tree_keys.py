"""What drafters mean by their keys, after a re-root."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.core.node_keys import text_key
from runtime.core.tree import TokenTree

TEXT = (3, 1, 4)
GUESSES = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 6), st.integers(0, 2)), min_size=6, max_size=40
)


@given(GUESSES, st.integers(0, 40))
def test_after_a_reroot_each_drafter_still_means_the_nodes_that_it_has_guessed(
    guesses: list[tuple[str, int, int]], place: int
) -> None:
    """Whichever of them was first: its growth below them goes on, and nobody else's does."""
    tree = TokenTree(text_key(TEXT), TEXT[-1], 64, 8)
    for drafter, above, token in guesses:
        mine = [*tree.nodes_by_key[drafter]]
        parent = np.array([mine[min(above, len(mine) - 1)]], np.uint64)
        tree.merge(parent, np.array([token]), np.array([-0.5]), drafter, lambda ranks, said: said)
    ends = [node for node in range(len(tree)) if tree.fanout[node]]
    path = tuple(tree.tokens_to(ends[place % len(ends)]))
    kept = {
        (drafter, tuple(tree.tokens_to(node))[len(path) :])
        for node in range(1, len(tree))
        for drafter in tree.drafters_of(node)
        if tuple(tree.tokens_to(node))[: len(path)] == path
    }
    proposals = {
        tuple(tree.tokens_to(node))[len(path) :]: tree.proposals(node)
        for node in range(1, len(tree))
        if tuple(tree.tokens_to(node))[: len(path)] == path
    }
    assert tree.reroot(path)
    root = text_key([*TEXT, *path])
    for drafter in "abc":
        assert tree.nodes_by_key[drafter] == {root: 0} | {
            text_key(below, root): tree.descend(below)
            for who, below in kept
            if who == drafter and below
        }
    for node in range(1, len(tree)):
        assert tree.proposals(node) == proposals[tuple(tree.tokens_to(node))]
