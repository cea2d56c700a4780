"""A packed pass: of each session its root, and the nodes of its tree that are to be verified."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.kv.base import KVCache
from runtime.models.base import Part, Rows
from runtime.session import Session
from runtime.target.request_state import RequestState


@dataclass(frozen=True, slots=True)
class Batch:
    """One packed pass: the sessions it serves, for each the nodes that get a row, and who gets the credit for these if they are accepted.

    Times are readings of the clock.
    """

    sessions: list[RequestState]
    nodes: list[list[int]]
    owed: list[list[str]]
    parts: list[Part]
    opened: float  # when its planning began
    waited: float  # seconds
    began: float


def pack(session: Session, cache: KVCache, nodes: Sequence[int]) -> Part:
    """`nodes` are closed under parents and in order; the cache holds all of the text but its last token."""
    tree, prefix, n = session.tree, len(session.tokens) - 1, len(nodes) + 1
    visible = np.zeros((n, n), dtype=np.bool_)
    visible[:, 0] = True
    visible[1:, 1:] = tree.visible(nodes)
    rows = np.asarray([0, *nodes])
    tokens, positions = np.frombuffer(tree.token, dtype=np.int64)[rows], prefix + np.frombuffer(tree.depth, dtype=np.int64)[rows]
    return Part(cache, Rows(tokens, positions, prefix, visible))


def unpack(cache: KVCache, prefix: int, nodes: Sequence[int], path: Sequence[int]) -> None:
    """After the pass: of its slots keep the root's and those of the accepted `path`."""
    row_of = {node: prefix + row for row, node in enumerate(nodes, start=1)}
    cache.keep(prefix + 1, [row_of[node] for node in path])
