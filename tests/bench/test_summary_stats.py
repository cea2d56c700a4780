"""Figures of the benchmark, against values worked out by hand and against brute force."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.core.summary_stats import (
    Spread,
    bound,
    expected_tokens,
    over_prompts,
    paired_ratios,
    rank_probabilities,
    spread,
)


def test_quartiles() -> None:
    assert spread([]) is None
    assert spread([3.0]) == Spread(3.0, 3.0, 3.0, 1)
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(2.0, 3.0, 4.0, 5)


def test_each_prompt_counts_once_with_its_median() -> None:
    values = {("a", 0): 1.0, ("a", 1): 2.0, ("a", 2): 90.0, ("b", 0): 4.0}
    assert over_prompts(values) == Spread(2.5, 3.0, 3.5, 2)


def test_ratios_are_of_the_same_prompt_and_repetition() -> None:
    above, below = (
        {("a", 0): 6.0, ("a", 1): 9.0, ("b", 0): 1.0},
        {("a", 0): 3.0, ("a", 1): 1.0, ("c", 0): 1.0},
    )
    assert paired_ratios(above, below) == {("a", 0): 2.0, ("a", 1): 9.0}


def test_acceptance_of_each_rank() -> None:
    assert rank_probabilities({1: 0.6, 2: 0.7, 4: 0.8}) == pytest.approx([0.6, 0.1, 0.05, 0.05])
    assert rank_probabilities({2: 0.5, 1: 0.6}) == pytest.approx([0.6, 0.0])
    assert rank_probabilities({}) == []


def test_the_best_tree_by_hand() -> None:
    ranks = [0.6, 0.3]
    # Values of nodes: first child 0.6, second 0.3; below the first 0.36 and 0.18; three deep 0.216;
    # below the second 0.18 and 0.09.
    assert expected_tokens(ranks, 1) == 1.0
    assert expected_tokens(ranks, 2) == pytest.approx(1.6)
    assert expected_tokens(ranks, 3) == pytest.approx(1.96)
    assert expected_tokens(ranks, 4) == pytest.approx(2.26)
    assert expected_tokens(ranks, 5) == pytest.approx(2.476)
    assert expected_tokens(ranks, 7) == pytest.approx(2.836)
    assert expected_tokens([], 9) == 1.0
    assert expected_tokens([1.0], 9) == 9.0


def best_of_all_trees(ranks: list[float], rows: int) -> float:
    """The most that any set of `rows` - 1 nodes that holds each node's parent is worth."""
    depth = rows - 1
    nodes = [
        path
        for length in range(1, depth + 1)
        for path in itertools.product(range(len(ranks)), repeat=length)
    ]
    worth: dict[tuple[int, ...], float] = {(): 1.0}
    for path in nodes:
        worth[path] = worth[path[:-1]] * ranks[path[-1]]
    sets = (set(chosen) for chosen in itertools.combinations(nodes, rows - 1))
    trees = (
        chosen for chosen in sets if all(len(path) == 1 or path[:-1] in chosen for path in chosen)
    )
    return max(1.0 + sum(worth[path] for path in chosen) for chosen in trees)


@given(st.lists(st.floats(0.05, 0.95), min_size=2, max_size=2), st.integers(2, 4))
def test_no_tree_is_better(ranks: list[float], rows: int) -> None:
    assert expected_tokens(ranks, rows) == pytest.approx(best_of_all_trees(ranks, rows))


def test_the_bound_is_the_lower_of_the_two() -> None:
    times = {1: 0.02, 2: 0.02, 4: 0.05}
    found = bound(0.002, times, [0.6, 0.3])
    assert found.drafting == pytest.approx(550.0)
    assert found.verifying == pytest.approx(1.6 / 0.02)
    assert found.rows == 2
    assert found.rate == found.verifying
    assert bound(0.1, times, [0.6, 0.3]).rate == pytest.approx(60.0)


def test_the_bound_of_chains() -> None:
    times = {1: 0.02, 2: 0.02, 3: 0.02}
    assert bound(0.002, times, [0.6, 0.3]).verifying == pytest.approx(1.96 / 0.02)  # 1 + 0.6 + 0.36
    assert bound(0.002, times, [0.4, 0.3]).verifying == pytest.approx(
        1.7 / 0.02
    )  # 1 + 0.4 + 0.3, a sibling
    assert bound(0.002, times, [0.4, 0.3]).chain == pytest.approx(1.56 / 0.02)
