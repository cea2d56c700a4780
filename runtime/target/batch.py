"""Packs a forward pass: for each session its root and the tree nodes to verify."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.kv.base import KVCache
from runtime.models.base import PassInput, Rows
from runtime.target.request_state import RequestState
from runtime.target.session import Session


@dataclass(frozen=True, slots=True)
class BatchItem:
    """One session's share of a pass.

    `nodes` get a row in addition to the root. `credited`, parallel to them, names who is credited
    if the node is accepted. `expected` is the number of `nodes` that will be accepted, by their
    path probabilities.
    """

    state: RequestState
    nodes: list[int]
    credited: list[str]
    part: PassInput
    expected: float = 0.0


@dataclass(frozen=True, slots=True)
class Batch:
    """One packed pass. Times are clock readings, or durations in seconds."""

    items: list[BatchItem]
    opened: float  # when its planning began
    waited: float  # seconds
    began: float

    @property
    def parts(self) -> list[PassInput]:
        return [item.part for item in self.items]


def pack(session: Session, cache: KVCache, nodes: Sequence[int]) -> PassInput:
    """Make the rows of one session: the root's, then those of `nodes`.

    `nodes` are closed under parents and in order. The cache holds the text without its last token.
    """
    tree, prefix, n = session.tree, len(session.tokens) - 1, len(nodes) + 1
    visible = np.zeros((n, n), dtype=np.bool_)
    visible[:, 0] = True
    visible[1:, 1:] = tree.ancestor_mask(nodes)
    rows = np.asarray([0, *nodes])
    tokens = np.frombuffer(tree.token, dtype=np.int64)[rows]
    positions = prefix + np.frombuffer(tree.depth, dtype=np.int64)[rows]
    return PassInput(cache, Rows(tokens, positions, prefix, visible))


def accepted_rows(nodes: Sequence[int], path: Sequence[int]) -> list[int]:
    """Return the rows of the root and of an accepted path, in a pass over the root and `nodes`."""
    row_of = {node: row for row, node in enumerate(nodes, start=1)}
    return [0, *(row_of[node] for node in path)]


def keep_accepted(cache: KVCache, prefix: int, nodes: Sequence[int], path: Sequence[int]) -> None:
    """Roll the cache back after a pass: keep the slots of the root and of `path`."""
    cache.keep(prefix + 1, [prefix + row for row in accepted_rows(nodes, path)[1:]])
