"""The token tree against a dictionary of paths, through any sequence of growth and re-roots."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from runtime.core import node_keys
from runtime.core.node_keys import EMPTY_TEXT, MASK_64, child_key, mix64, text_key
from runtime.core.node_table import COLUMNS
from runtime.core.tree import TokenTree

TEXT = (3, 1, 4)
MAX_NODES, MAX_DEPTH = 12, 4
TOKENS = st.integers(0, 3)
Path = tuple[int, ...]
# What a root says of itself, also one that was a guess before: no sum begins above it.
ROOT_VALUES = {
    "parent": -1,
    "depth": 0,
    "rank": 0,
    "raw_logprob": 0.0,
    "score": 0.0,
    "path": 0.0,
    "off_top_logprob": 0.0,
    "off_top_count": 0,
}


class TreeMachine(RuleBasedStateMachine):
    """Compares a tree with oracles.

    `paths` holds score and expansion of every path below the root, in order of arrival.
    `proposals` holds who guessed it, with rank and score. `nodes_by_key` holds what each drafter
    means by a key.
    """

    bits = 64  # of names

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(node_keys, "KEY_MASK", (1 << self.bits) - 1)
        self.text = list(TEXT)
        self.tree = TokenTree(text_key(TEXT), TEXT[-1], MAX_NODES, MAX_DEPTH)
        self.paths: dict[Path, tuple[float, bool]] = {}
        self.proposals: dict[Path, list[tuple[str, int, float]]] = {}
        self.nodes_by_key: dict[str, dict[int, Path]] = {}
        self.root_expanded = False

    def teardown(self) -> None:
        self.patch.undo()

    def node(self, path: Path) -> int:
        found = self.tree.descend(path)
        assert found is not None
        return found

    def name(self, path: Path) -> int:
        return text_key([*self.text, *path])

    def names_of(self, drafter: str) -> dict[int, Path]:
        return self.nodes_by_key.setdefault(drafter, {self.name(()): ()})

    @rule(data=st.data(), token=TOKENS, score=st.floats(-9.0, 0.0))
    def add(self, data: st.DataObject, token: int, score: float) -> None:
        parent: Path = data.draw(st.sampled_from([(), *self.paths]))
        path, drafter = (*parent, token), f"d{token}"
        mine, name = self.names_of(drafter), self.name(path)
        fits = (
            path not in self.paths
            and name not in mine
            and len(self.paths) < MAX_NODES
            and len(path) <= MAX_DEPTH
        )
        rank = self.tree.fanout[self.node(parent)]
        added = self.tree.add(self.node(parent), token, score, drafter=drafter)
        assert added == (len(self.tree) - 1 if fits else None)
        if fits:
            self.paths[path], self.proposals[path], mine[name] = (
                (score, False),
                [(drafter, rank, score)],
                path,
            )

    def heard(self, parent: Path, drafter: str) -> int:
        """How many children it has guessed there."""
        siblings = [proposals for path, proposals in self.proposals.items() if path[:-1] == parent]
        return sum(name == drafter for proposals in siblings for name, _, _ in proposals)

    @rule(
        paths=st.lists(st.lists(TOKENS, min_size=1, max_size=MAX_DEPTH).map(tuple), max_size=8),
        drafter=st.sampled_from(["d0", "many"]),
    )
    def merge(self, paths: list[Path], drafter: str) -> None:
        """Merges a draft by key, each node twice.

        Children without a parent, or without room, are dropped. Nodes that others guessed are
        echoed and keep their scores. A key stands for the first node its drafter gave it.
        """
        nodes = sorted({path[:n] for path in paths for n in range(1, len(path) + 1)}, key=len)
        offered = [*nodes, *nodes]
        above = np.array([self.name(path[:-1]) for path in offered], dtype=np.uint64)
        tokens, raw_logprob = (
            np.array([path[-1] for path in offered], dtype=np.int64),
            np.full(len(offered), -2.0),
        )
        mine, new, shared, lost = self.names_of(drafter), list[int](), set[Path](), Counter[str]()
        for row, (parent_name, token) in enumerate(
            zip(above.tolist(), tokens.tolist(), strict=True)
        ):
            name = child_key(parent_name, token)
            if parent_name not in mine:
                lost["stale"] += 1
                continue
            path = (*mine[parent_name], token)
            if name in mine:
                lost["repeated" if mine[name] == path else "collisions"] += 1
                continue
            proposal = (drafter, self.heard(path[:-1], drafter), -2.0)
            if path in self.paths:
                lost["repeated"] += 1
                self.proposals[path].append(proposal)
            elif len(self.paths) < MAX_NODES and len(path) <= MAX_DEPTH:
                new.append(row)
                self.paths[path], self.proposals[path] = (-2.0, False), [proposal]
            else:
                lost["full"] += 1
                continue
            mine[name] = path
            names = {
                who
                for sibling, proposals in self.proposals.items()
                if sibling[:-1] == path[:-1]
                for who, _, _ in proposals
            }
            if len(names) > 1:
                shared.add(path[:-1])
        merged = self.tree.merge(
            above, tokens, raw_logprob, drafter, lambda ranks, raw_logprob: raw_logprob
        )
        assert merged.rows == new
        assert {tuple(self.tree.tokens_to(parent)) for parent in merged.shared} == shared
        assert len(merged.shared) == len(shared)
        assert (len(merged.stale), merged.repeated) == (lost["stale"], lost["repeated"])
        assert (merged.full, merged.collisions) == (lost["full"], lost["collisions"])
        assert not merged.collisions or self.bits < 64

    @rule(data=st.data(), score=st.floats(-9.0, 0.0))
    def rescore(self, data: st.DataObject, score: float) -> None:
        chosen = (
            data.draw(st.lists(st.sampled_from([*self.paths]), max_size=4)) if self.paths else []
        )
        self.tree.rescore({self.node(path): score for path in chosen})
        for path in chosen:
            self.paths[path] = score, self.paths[path][1]

    @rule(data=st.data())
    def expand(self, data: st.DataObject) -> None:
        path: Path = data.draw(st.sampled_from([(), *self.paths]))
        self.tree.expanded[self.node(path)] = True
        if path:
            self.paths[path] = (self.paths[path][0], True)
        else:
            self.root_expanded = True

    @rule(data=st.data(), beyond=st.lists(TOKENS, max_size=2))
    def reroot(self, data: st.DataObject, beyond: list[int]) -> None:
        tokens = (*data.draw(st.sampled_from([(), *self.paths])), *beyond)
        hit = tokens in self.paths or not tokens
        if tokens:
            self.root_expanded = hit and self.paths[tokens][1]
        survivors = {
            path[len(tokens) :]: kept
            for path, kept in self.paths.items()
            if path[: len(tokens)] == tokens and path != tokens
        }
        ranks = {path: self.tree.rank[self.node((*tokens, *path))] for path in survivors}
        assert self.tree.reroot(tokens) == hit
        self.text.extend(tokens)
        self.paths = survivors
        self.proposals = {path: self.proposals[(*tokens, *path)] for path in survivors}
        self.nodes_by_key = {
            who: {self.name(()): ()}
            for proposals in self.proposals.values()
            for who, _, _ in proposals
        }
        for path, proposals in self.proposals.items():
            for who, _, _ in proposals:
                self.nodes_by_key[who][self.name(path)] = path
        assert {path: self.tree.rank[self.node(path)] for path in survivors} == ranks
        assert self.tree.key[0] == text_key(self.text)
        assert self.tree.token[0] == self.text[-1]

    @invariant()
    def holds_exactly_the_paths(self) -> None:
        tree = self.tree
        found = {tuple(tree.tokens_to(node)): node for node in range(1, len(tree))}
        assert found.keys() == self.paths.keys()
        assert len(tree) == 1 + len(self.paths) <= 1 + MAX_NODES
        assert tree.expanded[0] == self.root_expanded
        assert {name: getattr(tree, name)[0] for name in ROOT_VALUES} == ROOT_VALUES
        for path, node in found.items():
            score, expanded = self.paths[path]
            assert tree.descend(path) == node
            assert tree.key[node] == self.name(path)
            assert 0 <= tree.parent[node] < node
            assert tree.depth[node] == len(path) <= MAX_DEPTH
            assert (tree.score[node], tree.expanded[node]) == (score, expanded)
            assert [tuple(proposal) for proposal in tree.proposals(node)] == self.proposals[path]
            assert tree.drafters_of(node) == [name for name, _, _ in self.proposals[path]]
            assert math.isclose(
                tree.path[node],
                sum(self.paths[path[:n]][0] for n in range(1, len(path) + 1)),
                abs_tol=1e-9,
            )
            turned = tree.off_top_count[node] - tree.off_top_count[tree.parent[node]]
            assert turned in (0, 1)
            assert math.isclose(
                tree.off_top_logprob[node] - tree.off_top_logprob[tree.parent[node]],
                turned * score,
                abs_tol=1e-9,
            )
        for who in tree.nodes_by_key.keys() | self.nodes_by_key.keys():
            meant = {
                name: tuple(tree.tokens_to(node))
                for name, node in tree.nodes_by_key.get(who, {}).items()
                if node
            }
            assert meant == {
                name: path for name, path in self.nodes_by_key.get(who, {}).items() if path
            }, who
        for node in range(len(tree)):
            below = {path[-1]: child for path, child in found.items() if tree.parent[child] == node}
            assert tree.children(node) == sorted(below.values())
            assert tree.fanout[node] == len(below)
            best = [child for child in below.values() if tree.score[child] == tree.top[node]]
            assert not best or any(
                tree.off_top_count[child] == tree.off_top_count[node] for child in best
            )  # the likeliest is no turn
            assert {token: tree.child(node, token) for token in range(4)} == {
                token: below.get(token) for token in range(4)
            }

    @invariant()
    def the_best_are_best_and_hold_their_parents(self) -> None:
        for count in range(len(self.tree) + 1):
            best = self.tree.best_nodes(count)
            assert best == sorted(set(best))
            assert len(best) == min(count, len(self.paths))
            assert {self.tree.parent[node] for node in best} <= {0, *best}
            rest = set(range(1, len(self.tree))) - set(best)
            assert all(
                self.tree.path[node] >= self.tree.path[other] for node in best for other in rest
            )

    @invariant()
    def a_node_sees_its_ancestors_and_itself(self) -> None:
        for count in (len(self.paths), len(self.paths) // 2):
            nodes = self.tree.best_nodes(count)
            paths = [self.tree.tokens_to(node) for node in nodes]
            expected = [[path[: len(above)] == above for above in paths] for path in paths]
            assert np.array_equal(
                self.tree.ancestor_mask(nodes),
                np.array(expected, dtype=bool).reshape(len(nodes), len(nodes)),
            )


class ShortNames(TreeMachine):
    """Where most trees hold two texts of one name."""

    bits = 5


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=40, stateful_step_count=25)
TestTreeOfShortNames = ShortNames.TestCase
TestTreeOfShortNames.settings = settings(max_examples=80, stateful_step_count=25)


def test_a_name_is_that_of_the_whole_text() -> None:
    assert text_key([]) == EMPTY_TEXT
    assert (
        text_key([5, 6, 7])
        == mix64(mix64(mix64(EMPTY_TEXT, 5), 6), 7)
        == text_key([6, 7], text_key([5]))
    )
    names = {text_key(text) for n in range(4) for text in np.ndindex(*[6] * n)}
    assert len(names) == 1 + 6 + 36 + 216
    assert all(0 <= name <= MASK_64 for name in names)


def test_names_are_the_same_in_every_process_and_version() -> None:
    """The first three numbers of SplitMix64 from seed 0, as published."""
    assert [mix64(0, 0), mix64(0, 1), mix64(0, 2)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]
    assert text_key([0]) == mix64(0, 1)


def test_what_is_said_stands_beside_the_score() -> None:
    tree = TokenTree(1, 0, 8, 8)
    node = tree.add(0, 5, -0.1, raw_logprob=-3.0, drafter="a")
    assert node == 1
    assert (tree.score[1], tree.raw_logprob[1], tree.path[1], tree.drafter[1]) == (
        -0.1,
        -3.0,
        -0.1,
        "a",
    )
    assert tree.reroot([6]) is False
    assert (len(tree), tree.key[0], tree.token[0]) == (1, mix64(1, 6), 6)


def test_no_path_leads_to_a_node_that_is_not_there() -> None:
    tree = TokenTree(1, 0, 8, 8)
    tree.add(0, 5, -0.1)
    assert tree.descend([5, 5]) is None
    assert tree.descend([]) == 0
    assert tree.tokens_to(0) == []


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 3), st.floats(-9.0, 0.0), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from([4, 64]),
)
def test_a_message_is_its_nodes_one_by_one(
    guesses: list[tuple[int, int, float, bool]], bits: int
) -> None:
    """Growth in one message or node by node gives the same columns, echoes and keys."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node_keys, "KEY_MASK", (1 << bits) - 1)
        keys, tokens, raw_logprob = (
            [text_key(TEXT)],
            np.array([guess[1] for guess in guesses]),
            np.array([guess[2] for guess in guesses]),
        )
        parents = []
        for place, token, _, _ in guesses:
            parents.append(keys[place % len(keys)])
            keys.append(child_key(parents[-1], token))
        above, first = np.array(parents, np.uint64), np.array([guess[3] for guess in guesses])
        trees = [TokenTree(text_key(TEXT), TEXT[-1], 9, 3) for _ in range(2)]
        for tree in trees:
            tree.merge(
                above[first],
                tokens[first],
                raw_logprob[first],
                "a",
                lambda ranks, raw_logprob: raw_logprob - ranks,
            )
        whole = trees[0].merge(
            above, tokens, raw_logprob, "b", lambda ranks, raw_logprob: raw_logprob - ranks
        )
        parts = [
            trees[1].merge(
                above[n : n + 1],
                tokens[n : n + 1],
                raw_logprob[n : n + 1],
                "b",
                lambda ranks, raw_logprob: raw_logprob - ranks,
            )
            for n in range(len(guesses))
        ]
    assert whole.rows == [n for n, part in enumerate(parts) if part.rows]
    assert whole.stale == [n for n, part in enumerate(parts) if part.stale]
    assert (whole.repeated, whole.full) == (
        sum(part.repeated for part in parts),
        sum(part.full for part in parts),
    )
    assert whole.collisions == sum(part.collisions for part in parts)
    one, many = trees
    assert all(
        getattr(one, name) == getattr(many, name)
        for name in (*COLUMNS, "drafter", "later_proposals", "nodes_by_key")
    )
