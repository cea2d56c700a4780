"""The token tree: guesses that continue the committed tokens.

A node is its parent and its token, so equal guesses of different drafters are one node. Drafters refer to nodes by the names
of runtime.node_names, and each has names of its own here: what one of them sends cannot change what another one means.
"""

from array import array
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.node_names import Ints, Keys, child_key, child_keys, text_key

Floats = npt.NDArray[np.float64]
Estimate = Callable[[Ints, Floats], Floats]  # ranks and what was said of nodes -> their scores


@dataclass(frozen=True, slots=True)
class Merged:
    """What became of nodes that were offered. `rows`: places of those that are new, in order.

    stale: rows whose parent this drafter has not guessed; repeated: they were there; full: beyond the limit of nodes or depth;
    collisions: named as another node that the same drafter has guessed, which no honest drafter sends.
    shared: the nodes whose children more than one has guessed now, as far as these have changed that.
    """

    rows: list[int]
    stale: list[int]
    repeated: int
    full: int
    collisions: int
    shared: list[int]


class Voice(NamedTuple):
    """Who has guessed a node: as which of its own guesses for that place, from 0 on, and the log of the estimate that it sent."""

    drafter: str
    rank: int
    said: float


class TokenTree:
    """Parallel arrays in order of arrival: a parent always stands before its children. Index 0 is the root.

    drafter[i] names who guessed node i first, rank[i] as which of its own guesses for that place, said[i] is the log of its estimate that
    the target takes the node once it is at i's parent; `echoes` has, by node, those who have guessed it since. score[i] is the
    log of what is believed; path[i] is the sum of scores from the root, aside[i] the part of it by the turns[i] nodes on the way that
    were not the best of their siblings when they were scored; fanout[i] is the number of i's children; expanded[i] tells whether somebody
    was asked for its children. `below` has the nodes by parent << 32 | token; `named`, for each drafter, the root and the nodes that it has
    guessed, by name.
    """

    __slots__ = (
        "aside",
        "below",
        "depth",
        "drafter",
        "echoes",
        "expanded",
        "fanout",
        "key",
        "max_depth",
        "max_nodes",
        "named",
        "parent",
        "path",
        "rank",
        "said",
        "score",
        "token",
        "turns",
    )

    def __init__(self, root_key: int, root_token: int, max_nodes: int, max_depth: int) -> None:
        self.max_nodes, self.max_depth = max_nodes, max_depth
        self._start(root_key, root_token)

    def _start(self, root_key: int, root_token: int) -> None:
        # Arrays of the standard library: quick to read and to append one by one, and numpy sees them without a copy.
        self.key = array("Q", [root_key])
        self.token, self.parent, self.depth = array("q", [root_token]), array("q", [-1]), array("q", [0])
        self.rank, self.fanout, self.expanded = array("q", [0]), array("q", [0]), array("b", [False])
        self.said, self.score, self.path = array("d", [0.0]), array("d", [0.0]), array("d", [0.0])
        self.aside, self.turns = array("d", [0.0]), array("q", [0])
        self.drafter = [""]
        self.echoes: dict[int, list[Voice]] = {}
        self.below: dict[int, int] = {}
        self.named = _nobody_yet(root_key)

    def __len__(self) -> int:
        """Number of nodes, the root included."""
        return len(self.key)

    def add(self, parent: int, token: int, score: float, said: float | None = None, drafter: str = "") -> int | None:
        """The new node's index; None where it is there already, its name is taken, or it is beyond the limit of nodes or depth.

        `said` is `score` before calibration; without it they are the same. The rank is the place among all siblings: for a tree that one
        grows alone.
        """
        node, key, mine = len(self.key), child_key(self.key[parent], token), self.named[drafter]
        taken = self.child(parent, token) is not None or key in mine
        if taken or node > self.max_nodes or self.depth[parent] >= self.max_depth:
            return None
        turned = self.best_below(parent) >= score
        self.key.append(key)
        self.token.append(token)
        self.parent.append(parent)
        self.depth.append(self.depth[parent] + 1)
        self.said.append(score if said is None else said)
        self.score.append(score)
        self.path.append(self.path[parent] + score)
        self.aside.append(self.aside[parent] + score * turned)
        self.turns.append(self.turns[parent] + turned)
        self.rank.append(self.fanout[parent])
        self.fanout[parent] += 1
        self.fanout.append(0)
        self.expanded.append(False)
        self.drafter.append(drafter)
        self.below[parent << 32 | token] = mine[key] = node
        return node

    def merge(self, parents: Keys, tokens: Ints, said: Floats, drafter: str, estimate: Estimate) -> Merged:
        """Add many nodes (n,) that one has guessed, given by the names of their parents, in their order: as by `add` for each, with its
        rank among its own guesses for that place, and estimate(rank, said) for score. Of nodes that others had guessed it is kept who
        echoes them; scores are left to `rescore`."""
        names = child_keys(parents, tokens)
        mine, alone, depth, fanout, old, size = self.named[drafter], len(self.named) == 1, self.depth, self.fanout, len(self), len(self)
        above_of, token_of = self.parent, self.token
        repeated = full = collisions = 0
        rows, ranks, stale = list[int](), list[int](), list[int]()
        counts: dict[int, int] = {}  # of a node's children, those that this one has guessed
        best: dict[int, float] = {}  # the highest score of a child of before
        others: set[int] = set()  # nodes of which somebody else had guessed a child
        shared: dict[int, None] = {}
        for row, (above, token, name) in enumerate(zip(parents.tolist(), tokens.tolist(), names.tolist(), strict=True)):
            parent = mine.get(above)
            if parent is None:
                stale.append(row)
                continue
            if (known := mine.get(name)) is not None:
                if above_of[known] == parent and token_of[known] == token:
                    repeated += 1
                else:
                    collisions += 1
                continue
            if parent not in counts and (parent >= old or not fanout[parent]):
                counts[parent] = 0
            elif parent not in counts:
                heard = [who for child in self.children(parent) for who in self.names(child)]
                counts[parent], best[parent] = heard.count(drafter), self.best_below(parent)
                if counts[parent] < len(heard):
                    others.add(parent)
            if not alone and (twin := self.child(parent, token)) is not None:
                repeated += 1
                mine[name] = twin
                self.echoes.setdefault(twin, []).append(Voice(drafter, counts[parent], float(said[row])))
            elif size > self.max_nodes or (deep := depth[parent] + 1) > self.max_depth:
                full += 1
                continue
            else:
                mine[name] = size
                size += 1
                rows.append(row)
                above_of.append(parent)
                token_of.append(token)
                ranks.append(counts[parent])
                fanout[parent] += 1
                fanout.append(0)
                depth.append(deep)
            counts[parent] += 1
            if parent in others:
                shared[parent] = None
        if rows:
            new = np.array(rows)
            scores = estimate(np.array(ranks), said[new])
            self.key.frombytes(names[new].tobytes())
            self.said.frombytes(said[new].tobytes())
            self.score.frombytes(scores.tobytes())
            self.expanded.frombytes(bytes(len(rows)))
            self.below.update(zip(_places(self.parent[old:], self.token[old:]), range(old, size), strict=True))
            self.rank.extend(ranks)
            self.drafter += [drafter] * len(rows)
            path, aside, turns = self.path, self.aside, self.turns
            for parent, score in zip(above_of[old:], scores.tolist(), strict=True):
                path.append(path[parent] + score)
                turned = best.get(parent, -inf) >= score
                aside.append(aside[parent] + score if turned else aside[parent])
                turns.append(turns[parent] + 1 if turned else turns[parent])
                if not turned:
                    best[parent] = score
        return Merged(rows, stale, repeated, full, collisions, list(shared))

    def names(self, node: int) -> list[str]:
        """All who have guessed it, the first of them first."""
        return [self.drafter[node], *(voice.drafter for voice in self.echoes.get(node, ()))]

    def voices(self, node: int) -> list[Voice]:
        """The same, with what they said."""
        first = Voice(self.drafter[node], self.rank[node], self.said[node])
        return [first, *self.echoes.get(node, ())]

    def rescore(self, scores: Mapping[int, float]) -> None:
        """Believe something else of these nodes. All turns are judged anew."""
        for node, score in scores.items():
            self.score[node] = score
        believed, parents = self.score.tolist(), self.parent.tolist()
        best: dict[int, int] = {}  # child by parent
        for node, parent in enumerate(parents):
            if parent not in best or believed[node] > believed[best[parent]]:
                best[parent] = node
        path, aside, turns = [0.0], [0.0], [0]
        for node in range(1, len(parents)):
            parent, score = parents[node], believed[node]
            turned = best[parent] != node
            path.append(path[parent] + score)
            aside.append(aside[parent] + score if turned else aside[parent])
            turns.append(turns[parent] + turned)
        self.path, self.aside, self.turns = array("d", path), array("d", aside), array("q", turns)

    def best_below(self, parent: int) -> float:
        """The highest score of a child; -inf where there is none."""
        return max((self.score[child] for child in self.children(parent)), default=-inf)

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` with this token; None where there is none."""
        return self.below.get(node << 32 | token)

    def children(self, node: int) -> list[int]:
        """In order of arrival."""
        found: list[int] = np.flatnonzero(np.frombuffer(self.parent, dtype=np.int64) == node).tolist() if self.fanout[node] else []
        return found

    def descend(self, tokens: Sequence[int]) -> int | None:
        """The node at the end of these tokens, counted from the root; None where the tree does not have it."""
        node = 0
        for token in tokens:
            child = self.child(node, token)
            if child is None:
                return None
            node = child
        return node

    def tokens_to(self, node: int) -> list[int]:
        """Token ids from the root's child down to `node`; empty for the root."""
        found: list[int] = []
        while node > 0:
            found.append(self.token[node])
            node = self.parent[node]
        return found[::-1]

    def reroot(self, tokens: Sequence[int]) -> bool:
        """Move the root along newly committed tokens and drop all that is not below it. True where it was a node (hit)."""
        node = self.descend(tokens)
        if node is None:
            self._start(text_key(tokens, self.key[0]), tokens[-1])
            return False
        if node > 0:
            self._keep_below(node)
        return True

    def _keep_below(self, root: int) -> None:
        """Make `root` the root. The nodes below it stay in their order: sums and names are not computed again."""
        if not self.fanout[root]:
            expanded = self.expanded[root]
            self._start(self.key[root], self.token[root])
            self.expanded[0] = expanded
            return
        kept = self._below(root)
        depth, path, aside, turns = self.depth[root], self.path[root], self.aside[root], self.turns[root]
        place = np.full(len(self), -1)  # new index by old; -1 where there is none
        place[kept] = np.arange(len(kept))
        for name in ("key", "token", "depth", "rank", "fanout", "expanded", "said", "score", "path", "aside", "turns"):
            old = getattr(self, name)
            setattr(self, name, array(old.typecode, np.frombuffer(old, dtype=old.typecode)[kept].tobytes()))
        self.parent = array("q", place[np.frombuffer(self.parent, dtype=np.int64)[kept]].tobytes())
        np.frombuffer(self.depth, dtype=np.int64)[:] -= depth
        np.frombuffer(self.path)[:] -= path
        np.frombuffer(self.aside)[:] -= aside
        np.frombuffer(self.turns, dtype=np.int64)[:] -= turns
        self.drafter = [self.drafter[node] for node in kept.tolist()]
        self.parent[0], self.rank[0], self.said[0], self.score[0], self.drafter[0] = -1, 0, 0.0, 0.0, ""
        if self.echoes:
            moved = place.tolist()
            self.echoes = {moved[node]: voices for node, voices in self.echoes.items() if moved[node] > 0}
        self._look_up_anew()

    def _look_up_anew(self) -> None:
        """Make `below` and `named` again from what they stand for."""
        names = self.key.tolist()
        self.below = dict(zip(_places(self.parent[1:], self.token[1:]), range(1, len(names)), strict=True))
        self.named = named = _nobody_yet(names[0])
        if len(first := set(self.drafter[1:])) == 1:
            named[first.pop()] = dict(zip(names, range(len(names)), strict=True))
        else:
            for node, drafter in enumerate(self.drafter[1:], start=1):
                named[drafter][names[node]] = node
        for node, voices in self.echoes.items():
            name = names[node]
            for drafter, _, _ in voices:
                named[drafter][name] = node

    def _below(self, root: int) -> Ints:
        """Indices of `root` and all below it, in order. By pointer doubling: after n rounds every node has looked 2^n ancestors up."""
        inside = np.zeros(len(self), dtype=np.bool_)
        inside[root] = True
        jump = np.maximum(np.frombuffer(self.parent, dtype=np.int64), 0)
        for _ in range(self.max_depth.bit_length()):
            inside |= inside[jump]
            jump = jump[jump]
        return np.flatnonzero(inside)

    def best(self, count: int, values: Floats | None = None) -> list[int]:
        """The `count` nodes below the root with the highest path score, closed under parents, parents first.

        `values` (n,) are other scores of the paths; they too never rise on the way down.
        """
        n = len(self.key)
        if n - 1 <= count:
            return list(range(1, n))
        # Ties go to the older node: the best set holds its own parents.
        order = np.argsort(-(np.frombuffer(self.path) if values is None else values)[1:], kind="stable")[:count] + 1
        return sorted(order.tolist())

    def visible(self, nodes: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Ancestor mask (n, n) of `nodes`, which are closed under parents and in order; the root counts as prefix."""
        row_of: dict[int, int] = {}
        lines: list[int] = []  # one bit for each row that is seen
        for row, node in enumerate(nodes):
            above = row_of.get(self.parent[node])
            lines.append(1 << row if above is None else lines[above] | 1 << row)
            row_of[node] = row
        n, size = len(nodes), (len(nodes) + 7) // 8
        packed = np.frombuffer(b"".join([line.to_bytes(size, "little") for line in lines]), dtype=np.uint8).reshape(n, size)
        return np.unpackbits(packed, axis=1, count=n, bitorder="little").view(np.bool_)


def _nobody_yet(root_key: int) -> defaultdict[str, dict[int, int]]:
    """What each drafter means by a name: everybody knows the root's."""
    return defaultdict(lambda: {root_key: 0})


def _places(parents: "array[int]", tokens: "array[int]") -> list[int]:
    """The keys of `below`."""
    found: list[int] = (np.frombuffer(parents, np.int64) << 32 | np.frombuffer(tokens, np.int64)).tolist()
    return found
