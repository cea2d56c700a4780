"""What a drafter grows next, alone, together with others, and for several sessions at a time."""

from hypothesis import given
from hypothesis import strategies as st

from runtime.core.messages import Share
from runtime.core.node_keys import mix64
from runtime.core.tree import TokenTree
from runtime.draft.frontier import Frontier, allocate_rows

DEEP, LOW = 100, -100.0
SCORES = st.floats(-3.0, 0.0)
GROWTH = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4), SCORES), max_size=40)
EXPANDED = st.lists(st.integers(0, 30), max_size=10)


def grow(tree: TokenTree, growth: list[tuple[int, int, float]], expanded: list[int]) -> None:
    for place, token, score in growth:
        tree.add(place % len(tree), token, score)
    for node in expanded:
        tree.expanded[node % len(tree)] = True


@st.composite
def trees(draw: st.DrawFn) -> TokenTree:
    tree = TokenTree(draw(st.integers(0, 2**64 - 1)), 0, 64, 64)
    grow(tree, draw(GROWTH), draw(EXPANDED))
    return tree


def main_line(tree: TokenTree) -> list[int]:
    line = [0]
    while children := tree.children(line[-1]):
        line.append(min(children))
    return line


def owner(tree: TokenTree, node: int, of: int) -> int | None:
    """By the rule as it is told: the first ancestor off the main line names it."""
    line = set(main_line(tree))
    if node in line:
        return None
    while tree.parent[node] not in line:
        node = tree.parent[node]
    return mix64(tree.key[tree.parent[node]], tree.token[node]) % of


@given(trees(), st.integers(1, 8), st.integers(0, 6), st.floats(-5.0, 0.0))
def test_the_most_probable_first_within_bounds(
    tree: TokenTree, width: int, deepest: int, floor: float
) -> None:
    chosen = Frontier(tree, deepest, floor).best(width)
    expandable = {
        n
        for n in range(len(tree))
        if not tree.expanded[n] and tree.depth[n] < deepest and tree.path[n] >= floor
    }
    assert len(chosen) == min(width, len(expandable))
    assert set(chosen) <= expandable
    paths = [tree.path[node] for node in chosen]
    assert paths == sorted(paths, reverse=True)
    assert all(tree.path[other] <= min(paths) for other in expandable - set(chosen))


@given(trees(), st.integers(1, 5))
def test_a_branch_has_one_owner_named_by_where_it_left_the_main_line(
    tree: TokenTree, of: int
) -> None:
    shares = [
        set(Frontier(tree, DEEP, LOW, Share("s", index, of)).best(len(tree))) for index in range(of)
    ]
    for node in range(len(tree)):
        mine = owner(tree, node, of)
        wanted = set() if tree.expanded[node] else set(range(of)) if mine is None else {mine}
        assert {index for index in range(of) if node in shares[index]} == wanted


@given(
    trees(), st.lists(st.tuples(GROWTH, EXPANDED), max_size=4), st.integers(0, 6), st.integers(1, 3)
)
def test_what_is_kept_up_to_date_is_what_is_made_anew(
    tree: TokenTree,
    changes: list[tuple[list[tuple[int, int, float]], list[int]]],
    deepest: int,
    of: int,
) -> None:
    kept = Frontier(tree, deepest, -4.0, Share("s", 0, of))
    for growth, expanded in changes:
        grow(tree, growth, expanded)
        kept.drop_expanded()
        kept.extend()
        assert kept.expandable == Frontier(tree, deepest, -4.0, Share("s", 0, of)).expandable


def test_a_share_that_is_none_grows_the_main_line_alone() -> None:
    tree = TokenTree(1, 0, 64, 64)
    for parent, token in ((0, 5), (0, 6), (1, 7), (1, 8)):
        tree.add(parent, token, -0.5)
    assert Frontier(tree, DEEP, LOW, Share("s", 7, 2)).best(9) == [0, 1, 3]


# Several sessions


@given(st.lists(st.tuples(trees(), st.integers(1, 8)), max_size=5), st.integers(0, 20))
def test_rows_go_to_the_most_probable_of_all_and_one_to_each(
    sessions: list[tuple[TokenTree, int]], rows: int
) -> None:
    frontiers, widths = (
        [Frontier(tree, DEEP, LOW) for tree, _ in sessions],
        [width for _, width in sessions],
    )
    counts = allocate_rows(frontiers, widths, rows)
    assert len(counts) == len(frontiers)
    for count, frontier, width in zip(counts, frontiers, widths, strict=True):
        assert min(1, len(frontier.expandable)) <= count <= min(width, len(frontier.expandable))
    could = sum(
        min(width, len(frontier.expandable))
        for frontier, width in zip(frontiers, widths, strict=True)
    )
    assert sum(counts) == max(
        sum(bool(frontier.expandable) for frontier in frontiers), min(rows, could)
    )
    # Beyond the first of each, none that is left out is more probable than one that is in.
    taken = [
        path
        for count, frontier in zip(counts, frontiers, strict=True)
        for path, _ in frontier.expandable[1:count]
    ]
    left = [
        path
        for n, frontier, width in zip(counts, frontiers, widths, strict=True)
        for path, _ in frontier.expandable[max(n, 1) : width]
    ]
    assert max(taken, default=0.0) <= min(left, default=float("inf"))


def test_a_session_that_is_sure_gets_more_than_one_in_doubt() -> None:
    sure, doubting = TokenTree(1, 0, 64, 64), TokenTree(2, 0, 64, 64)
    for tree, score in ((sure, -0.1), (doubting, -3.0)):
        tree.expanded[0] = True
        for token in range(6):
            tree.add(0, token, score)
    frontiers = [Frontier(sure, DEEP, LOW), Frontier(doubting, DEEP, LOW)]
    assert allocate_rows(frontiers, [4, 4], 5) == [4, 1]
    assert allocate_rows(frontiers, [2, 4], 5) == [2, 3]
    assert allocate_rows([], [], 16) == []
