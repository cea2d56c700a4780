"""What a drafter grows next, alone and together with others."""

from hypothesis import given
from hypothesis import strategies as st

from runtime.frontier import frontier, owners
from runtime.tree import TokenTree, mix64

DEEP, LOW = 100, -100.0


@st.composite
def trees(draw: st.DrawFn) -> TokenTree:
    tree = TokenTree(draw(st.integers(0, 2**64 - 1)), 0, 64, 64)
    for place, token, score in draw(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4), st.floats(-3.0, 0.0)), max_size=40)):
        tree.add(place % len(tree), token, score)
    for node in draw(st.lists(st.integers(0, 30), max_size=10)):
        tree.expanded[node % len(tree)] = True
    return tree


def main_line(tree: TokenTree) -> list[int]:
    line = [0]
    while tree.children[line[-1]]:
        line.append(min(tree.children[line[-1]].values()))
    return line


@given(trees(), st.integers(1, 8), st.integers(0, 6), st.floats(-5.0, 0.0))
def test_the_most_probable_first_within_bounds(tree: TokenTree, width: int, deepest: int, floor: float) -> None:
    chosen = frontier(tree, width, 0, 1, deepest, floor)
    ripe = {n for n in range(len(tree)) if not tree.expanded[n] and tree.depth[n] < deepest and tree.path[n] >= floor}
    assert len(chosen) == min(width, len(ripe))
    assert set(chosen) <= ripe
    paths = [tree.path[node] for node in chosen]
    assert paths == sorted(paths, reverse=True)
    assert all(tree.path[other] <= min(paths) for other in ripe - set(chosen))


@given(trees(), st.integers(1, 5))
def test_together_they_grow_all_and_nothing_twice_but_the_main_line(tree: TokenTree, of: int) -> None:
    shares = [set(frontier(tree, len(tree), index, of, DEEP, LOW)) for index in range(of)]
    ripe = {node for node in range(len(tree)) if not tree.expanded[node]}
    line = set(main_line(tree))
    assert set().union(*shares) == ripe
    for node in ripe:
        assert sum(node in share for share in shares) == (of if node in line else 1)


@given(trees(), st.integers(2, 5))
def test_a_branch_has_one_owner_named_by_where_it_left_the_main_line(tree: TokenTree, of: int) -> None:
    line, found = set(main_line(tree)), owners(tree, of)
    for node in range(1, len(tree)):
        if node in line:
            assert found[node] is None
        elif tree.parent[node] in line:
            assert found[node] == mix64(tree.key[tree.parent[node]], tree.token[node]) % of
        else:
            assert found[node] == found[tree.parent[node]]


def test_a_share_that_is_none_grows_the_main_line_alone() -> None:
    tree = TokenTree(1, 0, 64, 64)
    for parent, token in ((0, 5), (0, 6), (1, 7), (1, 8)):
        tree.add(parent, token, -0.5)
    assert frontier(tree, 9, 7, 2, DEEP, LOW) == [0, 1, 3]
