"""The token tree: guesses that continue the committed tokens, with nodes named by the text that ends in them.

    key(text)  = fold of mix64 over its token ids
    key(child) = mix64(key(parent), token id)

so equal guesses of different drafters are one node, and a name stays valid when the root moves.
"""

from collections.abc import Iterable, Sequence
from operator import itemgetter

import numpy as np
import numpy.typing as npt

MASK = (1 << 64) - 1
EMPTY_TEXT = 0x9E3779B97F4A7C15


def mix64(key: int, token: int) -> int:
    """The name of the text `key` continued by `token` (finaliser of SplitMix64, Steele et al. 2014)."""
    x = (key + (token + 1) * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def text_key(tokens: Iterable[int], start: int = EMPTY_TEXT) -> int:
    """The name of a whole text, or of the text named `start` continued by `tokens`."""
    key = start
    for token in tokens:
        key = mix64(key, token)
    return key


class TokenTree:
    """Parallel lists in order of arrival: a parent always stands before its children. Index 0 is the root.

    said[i] is the log of the drafter's estimate that the target takes node i once it is at i's parent, score[i] the same
    after calibration; path[i] is the sum of scores from the root; rank[i] is i's place among its siblings by arrival;
    drafter[i] names who guessed the node first; expanded[i] tells whether somebody was asked for its children.
    """

    __slots__ = (
        "children",
        "depth",
        "drafter",
        "expanded",
        "index",
        "key",
        "max_depth",
        "max_nodes",
        "parent",
        "path",
        "rank",
        "said",
        "score",
        "token",
    )

    def __init__(self, root_key: int, root_token: int, max_nodes: int, max_depth: int) -> None:
        self.max_nodes, self.max_depth = max_nodes, max_depth
        self._start(root_key, root_token)

    def _start(self, root_key: int, root_token: int) -> None:
        self.key = [root_key]
        self.token = [root_token]
        self.parent = [-1]
        self.depth = [0]
        self.said = [0.0]
        self.score = [0.0]
        self.path = [0.0]
        self.rank = [0]
        self.drafter = [""]
        self.expanded = [False]
        self.children: list[dict[int, int]] = [{}]
        self.index = {root_key: 0}

    def __len__(self) -> int:
        """Number of nodes, the root included."""
        return len(self.key)

    def add(self, parent: int, token: int, score: float, said: float | None = None, drafter: str = "") -> int | None:
        """The new node's index; None where it is there already, or beyond the limit of nodes or depth.

        `said` is `score` before calibration; without it they are the same.
        """
        if token in self.children[parent] or len(self.key) > self.max_nodes or self.depth[parent] >= self.max_depth:
            return None
        node, key = len(self.key), mix64(self.key[parent], token)
        self.key.append(key)
        self.token.append(token)
        self.parent.append(parent)
        self.depth.append(self.depth[parent] + 1)
        self.said.append(score if said is None else said)
        self.score.append(score)
        self.path.append(self.path[parent] + score)
        self.rank.append(len(self.children[parent]))
        self.drafter.append(drafter)
        self.expanded.append(False)
        self.children[parent][token] = node
        self.children.append({})
        self.index[key] = node
        return node

    def descend(self, tokens: Sequence[int]) -> int | None:
        """The node at the end of these tokens, counted from the root; None where the tree does not have it."""
        node = 0
        for token in tokens:
            child = self.children[node].get(token)
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
        place = {root: 0}  # new index by old
        for node, parent in enumerate(self.parent[root + 1 :], root + 1):
            if parent in place:
                place[node] = len(place)
        if len(place) == 1:
            expanded = self.expanded[root]
            self._start(self.key[root], self.token[root])
            self.expanded[0] = expanded
            return
        of = itemgetter(*place)
        depth, path = self.depth[root], self.path[root]
        self.parent = [-1, *map(place.__getitem__, of(self.parent)[1:])]
        self.depth = [below - depth for below in of(self.depth)]
        self.path = [below - path for below in of(self.path)]
        self.children = [{token: place[child] for token, child in below.items()} if below else {} for below in of(self.children)]
        self.key, self.token, self.expanded = list(of(self.key)), list(of(self.token)), list(of(self.expanded))
        self.said, self.score, self.rank = list(of(self.said)), list(of(self.score)), list(of(self.rank))
        self.drafter = list(of(self.drafter))
        self.said[0], self.score[0], self.rank[0], self.drafter[0] = 0.0, 0.0, 0, ""
        self.index = dict(zip(self.key, range(len(place)), strict=True))

    def best(self, count: int) -> list[int]:
        """The `count` nodes below the root with the highest path score, closed under parents, parents first."""
        n = len(self.key)
        if n - 1 <= count:
            return list(range(1, n))
        # A path score never rises on the way down, and ties go to the older node: the best set holds its own parents.
        order = np.argsort(-np.asarray(self.path[1:]), kind="stable")[:count] + 1
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
