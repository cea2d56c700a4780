"""Nodes that hang on a tree and on each other."""

import numpy as np
import pytest

from runtime.core.draft_nodes import DraftNodes, stack


def nodes(parents: list[int], roots: int | None = None) -> DraftNodes:
    n = len(parents)
    return DraftNodes(np.array(parents, np.int32), np.arange(n), np.zeros(n), roots)


def places(found: DraftNodes) -> list[list[int]]:
    return [np.arange(len(found.tokens))[level].tolist() for level in found.levels()]


def test_levels_are_told_apart_by_what_nodes_hang_on() -> None:
    assert places(nodes([0, 4, 2])) == [[0, 1, 2]]
    assert places(nodes([0, 4, 2], roots=5)) == [[0, 1, 2]]
    assert places(nodes([0, 5, 4, 6, 7, 5], roots=5)) == [[0, 2], [1, 4, 5], [3]]
    assert places(nodes([])) == places(nodes([], roots=1)) == [[]]


def test_children_are_those_that_hang_on_one_of_these() -> None:
    assert nodes([0, 1, 1, 2], roots=1).children_of(0).tolist() == [1, 2]
    assert nodes([0, 1, 1, 2], roots=1).children_of(3).tolist() == []
    assert nodes([0, 1, 1, 2]).children_of(0).tolist() == []


def test_levels_put_together_are_told_apart_again() -> None:
    found = stack([nodes([3, 0]), nodes([1, 1, 0]), nodes([2])], roots=4)
    assert found.parents.tolist() == [3, 0, 5, 5, 4, 8]
    assert places(found) == [[0, 1], [2, 3, 4], [5]]


@pytest.mark.parametrize("parents", [[1], [0, 2], [0, 3, 1]])
def test_a_node_before_its_parent_is_an_error(parents: list[int]) -> None:
    with pytest.raises(ValueError, match="comes before its parent"):
        nodes(parents, roots=1).levels()
