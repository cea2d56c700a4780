"""Stores the nodes of a token tree as columns, in order of arrival, the root first."""

from array import array
from collections.abc import Mapping, Sequence
from math import inf

import numpy as np

from runtime.core.node_keys import Floats, Ints, Keys

# Type of each column and the root's value. Arrays of the standard library are fast to read and
# append to one by one, and numpy views them without a copy.
COLUMNS: dict[str, tuple[str, float]] = {
    "key": ("Q", 0),
    "token": ("q", 0),
    "parent": ("q", -1),
    "depth": ("q", 0),
    "rank": ("q", 0),
    "fanout": ("q", 0),
    "expanded": ("b", False),
    "raw_logprob": ("d", 0.0),
    "score": ("d", 0.0),
    "top": ("d", -inf),
    "path": ("d", 0.0),
    "off_top_logprob": ("d", 0.0),
    "off_top_count": ("q", 0),
}
PATH_SUM_COLUMNS = ("depth", "path", "off_top_logprob", "off_top_count")  # sums along the path
EDGE_COLUMNS = ("parent", "rank", "raw_logprob", "score")  # meaningless for a root


class NodeTable:
    """A table of nodes, in which a parent always comes before its children.

    key              uint64, hash of the text that ends in the node
    token            token id
    parent           row of the parent, -1 for the root
    depth            tokens from the root to the node
    rank             position among its drafter's guesses for this place, from 0
    fanout           number of children
    expanded         whether somebody was asked for its children
    raw_logprob      log of the drafter's own estimate of acceptance after the parent
    score            log of the calibrated estimate
    top              highest score of its children, -inf without any
    path             sum of scores from the root
    off_top_logprob  part of `path` from nodes that were not the best of their siblings
    off_top_count    number of those nodes
    drafter          who guessed it first
    """

    __slots__ = (*COLUMNS, "drafter")

    key: "array[int]"
    token: "array[int]"
    parent: "array[int]"
    depth: "array[int]"
    rank: "array[int]"
    fanout: "array[int]"
    expanded: "array[int]"
    raw_logprob: "array[float]"
    score: "array[float]"
    top: "array[float]"
    path: "array[float]"
    off_top_logprob: "array[float]"
    off_top_count: "array[int]"
    drafter: list[str]

    def __init__(self, root_key: int, root_token: int) -> None:
        self.clear(root_key, root_token)

    def __len__(self) -> int:
        """Return the number of nodes, the root included."""
        return len(self.key)

    def clear(self, root_key: int, root_token: int) -> None:
        """Drop all nodes and start again with this root."""
        for name, (kind, value) in COLUMNS.items():
            setattr(self, name, array(kind, (value,)))
        self.key[0], self.token[0], self.drafter = root_key, root_token, [""]

    def append(
        self,
        keys: Keys,
        tokens: Ints,
        parents: Sequence[int],
        ranks: Sequence[int],
        raw_logprob: Floats,
        scores: Floats,
        drafter: str,
    ) -> None:
        """Add nodes (n,) of one drafter in order; a parent may be one of the nodes before."""
        self.key.frombytes(keys.tobytes())
        self.token.frombytes(tokens.tobytes())
        self.raw_logprob.frombytes(raw_logprob.tobytes())
        self.score.frombytes(scores.tobytes())
        self.parent.extend(parents)
        self.rank.extend(ranks)
        self.drafter += [drafter] * len(parents)
        self.expanded.frombytes(bytes(len(parents)))
        self.fanout.frombytes(bytes(8 * len(parents)))
        self.top.extend([-inf] * len(parents))
        fanout, top, depth = self.fanout, self.top, self.depth
        path, off_top_logprob, off_top_count = self.path, self.off_top_logprob, self.off_top_count
        for parent, score in zip(parents, scores.tolist(), strict=True):
            fanout[parent] += 1
            depth.append(depth[parent] + 1)
            path.append(path[parent] + score)
            if top[parent] >= score:
                off_top_logprob.append(off_top_logprob[parent] + score)
                off_top_count.append(off_top_count[parent] + 1)
            else:
                off_top_logprob.append(off_top_logprob[parent])
                off_top_count.append(off_top_count[parent])
                top[parent] = score

    def keep(self, rows: Ints) -> Ints:
        """Keep only these rows; the first is an ancestor of all others and becomes the root.

        Returns the new row of each old one, -1 for dropped rows. Sums are not recomputed.
        """
        moved = np.full(len(self), -1)
        moved[rows] = np.arange(len(rows))
        for name, (kind, _) in COLUMNS.items():
            kept = np.frombuffer(getattr(self, name), kind)[rows]
            if name in PATH_SUM_COLUMNS:
                kept -= kept[0]
            elif name == "parent":
                kept = moved[kept]
            setattr(self, name, array(kind, kept.tobytes()))
        self.drafter = [self.drafter[row] for row in rows.tolist()]
        for name in EDGE_COLUMNS:
            getattr(self, name)[0] = COLUMNS[name][1]
        self.drafter[0] = ""
        return moved

    def rescore(self, scores: Mapping[int, float]) -> None:
        """Change the scores of these nodes and recompute all sums.

        The best sibling is chosen again everywhere; of equal siblings the oldest is the best.
        """
        for node, score in scores.items():
            self.score[node] = score
        believed, parents, n = self.score.tolist(), self.parent.tolist(), len(self)
        best, top = [0] * n, [-inf] * n  # of each node's children
        for node in range(1, n):
            if believed[node] > top[parents[node]]:
                best[parents[node]], top[parents[node]] = node, believed[node]
        path, off_top_logprob, off_top_count = [0.0], [0.0], [0]
        for node in range(1, n):
            parent, score = parents[node], believed[node]
            turned = best[parent] != node
            path.append(path[parent] + score)
            off_top_logprob.append(
                off_top_logprob[parent] + score if turned else off_top_logprob[parent]
            )
            off_top_count.append(off_top_count[parent] + turned)
        self.top, self.off_top_count = array("d", top), array("q", off_top_count)
        self.path, self.off_top_logprob = array("d", path), array("d", off_top_logprob)
