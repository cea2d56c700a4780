"""The nodes of a token tree as a table: a row for each, in order of arrival, the root first."""

from array import array
from collections.abc import Mapping, Sequence
from math import inf

import numpy as np

from runtime.core.node_keys import Floats, Ints, Keys

# The type of each column and the root's value. Arrays of the standard library are quick to read and
# to append to one by one, and numpy sees them without a copy.
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
PATH_SUM_COLUMNS = ("depth", "path", "off_top_logprob", "off_top_count")  # sums over the way down
EDGE_COLUMNS = ("parent", "rank", "raw_logprob", "score")  # the root has none of these any more


class NodeTable:
    """A parent always stands before its children.

    key       uint64, the node's name
    token     its token id
    parent    row of its parent, -1 for the root
    depth     tokens from the root to it
    rank      which of its drafter's guesses for that place it is, from 0 on
    fanout    number of its children
    expanded  whether somebody was asked for its children
    said      log of the drafter's estimate that the target takes it once it is at the parent
    score     log of what is believed of that
    top       the highest score of its children, -inf without any
    path      sum of scores from the root
    aside     the part of `path` by nodes that were not the best of their siblings when scored
    turns     number of those nodes
    drafter   who guessed it first
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
        """The number of nodes, the root included."""
        return len(self.key)

    def clear(self, root_key: int, root_token: int) -> None:
        """Keep nothing; begin anew with this root."""
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
        """Add nodes (n,) of one drafter in their order; a parent may be one of those before."""
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
        """Keep these rows alone, the first of which is above all others and becomes the root.

        Returns the new row of each old one, -1 for those that are gone. No sum is computed again.
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
        """Believe something else of these nodes.

        All turns are judged anew: of equals the oldest is the best.
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
