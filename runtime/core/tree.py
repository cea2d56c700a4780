"""The token tree: guesses that continue the committed tokens.

A node is its parent and its token, so equal guesses of different drafters are one node. Drafters
refer to nodes by the keys of runtime.core.node_keys. Each drafter has a key map of its own, so what
one of them sends cannot change what another one means.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.core.node_keys import Floats, Ints, Keys, child_key, child_keys, text_key
from runtime.core.node_table import NodeTable

Estimate = Callable[[Ints, Floats], Floats]  # ranks and raw logprobs -> scores


@dataclass(frozen=True, slots=True)
class MergeResult:
    """Tells what happened to the nodes of a merge.

    rows        positions of new nodes, in order
    stale       positions of nodes whose parent this drafter has not guessed, in order
    repeated    number of nodes that existed
    full        number of nodes beyond the limit of nodes or depth
    collisions  number of nodes with the key of another node of the same drafter; no honest
                drafter sends them
    shared      nodes whose children several drafters have guessed, if this merge changed that
    """

    rows: list[int]
    stale: list[int]
    repeated: int
    full: int
    collisions: int
    shared: list[int]


class Proposal(NamedTuple):
    """A drafter's guess of a node: its rank among its own guesses for that place, from 0, and the
    log of the estimate that it sent.
    """

    drafter: str
    rank: int
    raw_logprob: float


class TokenTree(NodeTable):
    """A node table that finds nodes by parent and token, and by each drafter's keys.

    child_index      nodes by parent << 32 | token; None from a re-root until the next lookup
    nodes_by_key     for each drafter, the root and the nodes it has guessed, by key
    later_proposals  for each node, the proposals after that of its first drafter
    """

    __slots__ = ("child_index", "later_proposals", "max_depth", "max_nodes", "nodes_by_key")

    def __init__(self, root_key: int, root_token: int, max_nodes: int, max_depth: int) -> None:
        """Make a tree of the root alone, for up to `max_nodes` more nodes, `max_depth`
        tokens deep.
        """
        self.max_nodes, self.max_depth = max_nodes, max_depth
        super().__init__(root_key, root_token)

    def clear(self, root_key: int, root_token: int) -> None:
        super().clear(root_key, root_token)
        self.later_proposals: dict[int, list[Proposal]] = {}
        self.child_index: dict[int, int] | None = None
        self.nodes_by_key = _empty_key_maps(root_key)

    def add(
        self,
        parent: int,
        token: int,
        score: float,
        raw_logprob: float | None = None,
        drafter: str = "",
    ) -> int | None:
        """Add one node to a tree that a single drafter grows.

        Returns its index, or None if the node exists, its key is taken, or a limit is reached.
        `raw_logprob` is the score before calibration, by default `score` itself.
        """
        node, key, mine = len(self), child_key(self.key[parent], token), self.nodes_by_key[drafter]
        taken = self.child(parent, token) is not None or key in mine
        if taken or node > self.max_nodes or self.depth[parent] >= self.max_depth:
            return None
        keys, tokens = np.array([key], np.uint64), np.array([token], np.int64)
        told, scores = np.array([score if raw_logprob is None else raw_logprob]), np.array([score])
        rank = self.fanout[parent]
        self._insert(
            keys, tokens, [parent], [rank], told.astype(float), scores.astype(float), drafter
        )
        mine[key] = node
        return node

    def merge(
        self, parents: Keys, tokens: Ints, raw_logprob: Floats, drafter: str, estimate: Estimate
    ) -> MergeResult:
        """Add the nodes (n,) of one drafter in order, by its keys of their parents.

        A node's rank is its position among this drafter's own guesses for that place; its score is
        estimate(rank, raw_logprob). A node that others have guessed gets a later proposal;
        `rescore` changes scores.
        """
        keys = child_keys(parents, tokens)
        mine, depth_of = self.nodes_by_key[drafter], self.depth
        alone = len(self.nodes_by_key) == 1  # no other drafter has guessed a node
        old = size = len(self)
        repeated = full = collisions = 0
        rows, stale, placed, ranks = list[int](), list[int](), list[int](), list[int]()
        depths = list[int]()  # of the new nodes
        counts: dict[int, int] = {}  # of a node's children, those that this drafter has guessed
        others: set[int] = set()  # nodes of which somebody else had guessed a child
        shared: dict[int, None] = {}
        offered = tokens.tolist()
        nodes = zip(parents.tolist(), offered, keys.tolist(), strict=True)
        for row, (above, token, key) in enumerate(nodes):
            parent = mine.get(above)
            if parent is None:
                stale.append(row)
                continue
            if (known := mine.get(key)) is not None:
                if known < old:
                    same = self.parent[known] == parent and self.token[known] == token
                else:
                    same = placed[known - old] == parent and offered[rows[known - old]] == token
                repeated, collisions = repeated + same, collisions + (not same)
                continue
            if parent not in counts:
                counts[parent] = 0
                if parent < old and self.fanout[parent]:
                    heard = [
                        who for child in self.children(parent) for who in self.drafters_of(child)
                    ]
                    counts[parent] = heard.count(drafter)
                    if counts[parent] < len(heard):
                        others.add(parent)
            if not alone and (twin := self.child(parent, token)) is not None:
                repeated += 1
                mine[key] = twin
                proposal = Proposal(drafter, counts[parent], float(raw_logprob[row]))
                self.later_proposals.setdefault(twin, []).append(proposal)
            else:
                depth = (depth_of[parent] if parent < old else depths[parent - old]) + 1
                if size > self.max_nodes or depth > self.max_depth:
                    full += 1
                    continue
                mine[key] = size
                size += 1
                rows.append(row)
                placed.append(parent)
                ranks.append(counts[parent])
                depths.append(depth)
            counts[parent] += 1
            if parent in others:
                shared[parent] = None
        if rows:
            new = np.array(rows)
            keys, tokens, raw_logprob = keys[new], tokens[new], raw_logprob[new]
            scores = estimate(np.array(ranks), raw_logprob)
            self._insert(keys, tokens, placed, ranks, raw_logprob, scores, drafter)
        return MergeResult(rows, stale, repeated, full, collisions, list(shared))

    def _insert(
        self,
        keys: Keys,
        tokens: Ints,
        parents: list[int],
        ranks: list[int],
        raw_logprob: Floats,
        scores: Floats,
        drafter: str,
    ) -> None:
        """Add nodes as `append` does. Every node enters here; the caller registers its key."""
        old = len(self)
        self.append(keys, tokens, parents, ranks, raw_logprob, scores, drafter)
        if self.child_index is not None:
            self.child_index.update(self._child_entries(old))

    def _child_entries(self, first: int) -> Iterator[tuple[int, int]]:
        """Return the entries of `child_index` from node `first` on."""
        parents = np.frombuffer(self.parent, np.int64)[first:]
        tokens = np.frombuffer(self.token, np.int64)[first:]
        return zip((parents << 32 | tokens).tolist(), range(first, len(self)), strict=True)

    def drafters_of(self, node: int) -> list[str]:
        """Return all drafters that guessed a node, the first one first."""
        return [
            self.drafter[node],
            *(proposal.drafter for proposal in self.later_proposals.get(node, ())),
        ]

    def proposals(self, node: int) -> list[Proposal]:
        """Return all proposals of a node, the first one first."""
        first = Proposal(self.drafter[node], self.rank[node], self.raw_logprob[node])
        return [first, *self.later_proposals.get(node, ())]

    def child(self, node: int, token: int) -> int | None:
        """Return the child of `node` with this token, or None."""
        if self.child_index is None:
            self.child_index = dict(self._child_entries(1))
        return self.child_index.get(node << 32 | token)

    def children(self, node: int) -> list[int]:
        """Return the children of `node` in order of arrival."""
        found: list[int] = (
            np.flatnonzero(np.frombuffer(self.parent, dtype=np.int64) == node).tolist()
            if self.fanout[node]
            else []
        )
        return found

    def descend(self, tokens: Sequence[int]) -> int | None:
        """Return the node at the end of these tokens below the root, or None."""
        node = 0
        for token in tokens:
            child = self.child(node, token)
            if child is None:
                return None
            node = child
        return node

    def tokens_to(self, node: int) -> list[int]:
        """Return token ids from the root's child down to `node`; empty for the root."""
        found: list[int] = []
        while node > 0:
            found.append(self.token[node])
            node = self.parent[node]
        return found[::-1]

    def reroot(self, tokens: Sequence[int]) -> bool:
        """Move the root along newly committed tokens and drop all nodes outside the new subtree.

        Returns whether the new root was a node (hit). The root is found by descent, never by key.
        """
        node = self.descend(tokens)
        if node is None:
            self.clear(text_key(tokens, self.key[0]), tokens[-1])
            return False
        if node > 0:
            self._keep_subtree(node)
        return True

    def _keep_subtree(self, root: int) -> None:
        """Make `root` the root; its descendants keep their order."""
        if not self.fanout[root]:
            expanded = self.expanded[root]
            self.clear(self.key[root], self.token[root])
            self.expanded[0] = expanded
            return
        moved = self.keep(self._subtree(root))
        if self.later_proposals:
            places = moved.tolist()
            self.later_proposals = {
                places[node]: proposals
                for node, proposals in self.later_proposals.items()
                if places[node] > 0
            }
        self.child_index = None
        self._rebuild_keys()

    def _rebuild_keys(self) -> None:
        """Rebuild `nodes_by_key` from the table."""
        names = self.key.tolist()
        self.nodes_by_key = nodes_by_key = _empty_key_maps(names[0])
        if len(first := set(self.drafter[1:])) == 1:
            nodes_by_key[first.pop()] = dict(zip(names, range(len(names)), strict=True))
        else:
            for node, drafter in enumerate(self.drafter[1:], start=1):
                nodes_by_key[drafter][names[node]] = node
        for node, proposals in self.later_proposals.items():
            name = names[node]
            for drafter, _, _ in proposals:
                nodes_by_key[drafter][name] = node

    def _subtree(self, root: int) -> Ints:
        """Return the indices of `root` and its descendants, in order.

        Uses pointer doubling: after n rounds every node has looked at 2^n ancestors.
        """
        inside = np.zeros(len(self), dtype=np.bool_)
        inside[root] = True
        jump = np.maximum(np.frombuffer(self.parent, dtype=np.int64), 0)
        for _ in range(self.max_depth.bit_length()):
            inside |= inside[jump]
            jump = jump[jump]
        return np.flatnonzero(inside)

    def best_nodes(self, count: int, values: Floats | None = None) -> list[int]:
        """Return the `count` best nodes by path score, parents first, without the root.

        The set is closed under parents. `values` (n,) replaces the path scores; they must not rise
        from parent to child either.
        """
        n = len(self.key)
        if n - 1 <= count:
            return list(range(1, n))
        # Ties go to the older node: the best set holds its own parents.
        order = (
            np.argsort(
                -(np.frombuffer(self.path) if values is None else values)[1:], kind="stable"
            )[:count]
            + 1
        )
        return sorted(order.tolist())

    def ancestor_mask(self, nodes: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Return the mask (n, n) of ancestors of `nodes`, which are closed under parents and in
        order.

        The root counts as part of the prefix.
        """
        row_of: dict[int, int] = {}
        lines: list[int] = []  # a bit per visible row
        for row, node in enumerate(nodes):
            above = row_of.get(self.parent[node])
            lines.append(1 << row if above is None else lines[above] | 1 << row)
            row_of[node] = row
        n, size = len(nodes), (len(nodes) + 7) // 8
        packed = np.frombuffer(
            b"".join([line.to_bytes(size, "little") for line in lines]), dtype=np.uint8
        ).reshape(n, size)
        return np.unpackbits(packed, axis=1, count=n, bitorder="little").view(np.bool_)


def _empty_key_maps(root_key: int) -> defaultdict[str, dict[int, int]]:
    """Make a key map for each drafter that contains only the root."""
    return defaultdict(lambda: {root_key: 0})
