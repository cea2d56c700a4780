"""The token tree: guesses that continue the committed tokens, with nodes named by the text that ends in them.

    key(text)  = fold of mix64 over its token ids
    key(child) = mix64(key(parent), token id)

so equal guesses of different drafters are one node, and a name stays valid when the root moves.
"""

from collections.abc import Iterable, Sequence

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
        if node == 0:
            return True
        keys, token_ids, parents, expanded = self.key, self.token, self.parent, self.expanded
        scores, said, ranks, drafters = self.score, self.said, self.rank, self.drafter
        self._start(keys[node], token_ids[node])
        self.expanded[0] = expanded[node]
        moved = {node: 0}
        for i in range(node + 1, len(keys)):
            parent = moved.get(parents[i])
            if parent is None:
                continue
            added = self.add(parent, token_ids[i], scores[i], said[i], drafters[i])
            if added is not None:
                self.expanded[added], self.rank[added] = expanded[i], ranks[i]
                moved[i] = added
        return True

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
        row_of = {node: row for row, node in enumerate(nodes)}
        mask = np.zeros((len(nodes), len(nodes)), dtype=np.bool_)
        for row, node in enumerate(nodes):
            parent = row_of.get(self.parent[node])
            if parent is not None:
                mask[row] = mask[parent]
            mask[row, row] = True
        return mask
