"""Builds a tree from guesses for consecutive positions, treating the positions as independent."""

import heapq

import numpy as np
import numpy.typing as npt

from runtime.core.draft_nodes import NO_NODES, DraftNodes

MAX_NODES = 32  # of a tree at most
MIN_PATH_LOGPROB = float(np.log(0.01))  # path probability below which no row is spent on a node


def best_first(
    tokens: npt.NDArray[np.integer],
    scores: npt.NDArray[np.floating],
    nodes: int = MAX_NODES,
    floor: float = MIN_PATH_LOGPROB,
) -> DraftNodes:
    """Return the `nodes` most likely nodes, parents first.

    `tokens` and `scores` are (positions, k), best first; a score of -inf is no guess.
    """
    places, k = tokens.shape
    said, ids = scores.tolist(), tokens.tolist()
    parents: list[int] = []
    found: list[tuple[int, int]] = []  # place and rank
    ahead = [(-said[0][0], 0, 0, 0)] if places and k else []
    while ahead and len(found) < nodes and -ahead[0][0] >= floor:
        cost, place, rank, parent = heapq.heappop(ahead)
        found.append((place, rank))
        parents.append(parent)
        if rank + 1 < k:
            heapq.heappush(
                ahead, (cost + said[place][rank] - said[place][rank + 1], place, rank + 1, parent)
            )
        if place + 1 < places:
            heapq.heappush(ahead, (cost - said[place + 1][0], place + 1, 0, len(found)))
    if not found:
        return NO_NODES
    chosen = (
        np.array([ids[place][rank] for place, rank in found]),
        np.array([said[place][rank] for place, rank in found]),
    )
    return DraftNodes(np.array(parents), *chosen, roots=1)
