"""Token recycling (Luo et al. 2024, arXiv 2408.08696): reuses the target's earlier candidates.

The top candidates of every verified row are stored by the row's token, rejected rows included. The
tree below a new root is built from this table alone, without computation. One table serves all
sessions of a target. It holds tokens that the target considered likely in other texts, but no text
of more than two tokens can be read from it.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from runtime.core import noise
from runtime.core.draft_nodes import DraftNodes
from runtime.core.sampler_reference import SamplingInput
from runtime.drafters.base import Text
from runtime.heads.base import HeadContext, VerifiedStep
from runtime.kernels.topk import topk
from runtime.models.base import OutputSpec
from runtime.models.sampler import rank_candidates

CANDIDATES_PER_TOKEN = 8
MAX_NODES = 48  # per tree
MAX_DEPTH = 6
# Above temperature 0 a level costs several times as much, and deeper guesses are seldom right.
MAX_SAMPLED_DEPTH = 4
MIN_PATH_LOGPROB = np.log(0.01)  # nodes below this path probability are dropped
# Probability that a candidate of each rank is the target's choice, which shapes the tree. Measured
# with the target that ships, at temperature 0.
RANK_PROBABILITY = (0.4, 0.12, 0.06, 0.04, 0.03, 0.02, 0.02, 0.01)
UNKNOWN_TOKEN = -1

Ints = npt.NDArray[np.int64]
ScoredTokens = tuple[
    npt.NDArray[np.signedinteger[Any]], npt.NDArray[np.floating[Any]]
]  # token ids and logs of their shares


@dataclass(frozen=True, slots=True)
class Level:
    """The nodes of one depth.

    nodes    their places in the tree
    parents  places of their parents
    ranks    their ranks among the candidates of the parent
    above    places of the distinct parents
    rows     index of each node's parent in `above`
    """

    nodes: slice
    parents: Ints
    ranks: Ints
    above: Ints
    rows: Ints


class TokenRecycling:
    """A Head for any target.

    `tokens` and `scores`, both (vocabulary + 1, kept), hold the candidates after each token,
    likeliest first.
    """

    output_spec = OutputSpec()

    def __init__(self, vocabulary: int, kept: int = CANDIDATES_PER_TOKEN) -> None:
        self.kept = min(kept, vocabulary)
        # The last row belongs to UNKNOWN_TOKEN, which has no candidates.
        self.tokens = np.full((vocabulary + 1, self.kept), UNKNOWN_TOKEN, dtype=np.int64)
        self.scores = np.zeros((vocabulary + 1, self.kept), dtype=np.float32)

    def propose(self, seen: Sequence[VerifiedStep]) -> list[DraftNodes]:
        self.learn(seen)
        return [self.grow(one.text) for one in seen]

    def close(self, session: str) -> None:
        pass

    def learn(self, seen: Sequence[VerifiedStep]) -> None:
        """Store the candidates of all rows. If a token has several rows, the last accepted one
        wins.
        """
        logits = [torch.as_tensor(one.output.logits) for one in seen]
        values, tokens = topk(logits[0] if len(logits) == 1 else torch.cat(logits), self.kept)
        places, start = [], 0
        for one in seen:
            places += [*range(start, start + len(one.tokens)), *(start + row for row in one.path)]
            start += len(one.tokens)
        met = np.concatenate([one.tokens for one in seen])[places]
        self.tokens[met] = tokens.cpu().numpy()[places]
        self.scores[met] = values.log_softmax(-1).cpu().numpy()[places]

    def grow(self, text: Text) -> DraftNodes:
        levels, parents = tree_template(self.kept)
        tokens, logprobs, path = (
            np.full(len(parents), UNKNOWN_TOKEN),
            np.zeros(len(parents)),
            np.full(len(parents), -np.inf),
        )
        tokens[0], path[0] = text.tokens[-1], 0.0
        for depth, level in enumerate(
            levels if text.sampling.temperature == 0 else levels[:MAX_SAMPLED_DEPTH]
        ):
            if text.sampling.temperature == 0:
                rows = tokens[level.parents]
                tokens[level.nodes], logprobs[level.nodes] = (
                    self.tokens[rows, level.ranks],
                    self.scores[rows, level.ranks],
                )
            else:
                tokens[level.nodes], logprobs[level.nodes] = self.coupled_candidates(
                    text, tokens[level.above], level, len(text.tokens) + depth
                )
            path[level.nodes] = path[level.parents] + logprobs[level.nodes]
            if path[level.nodes].max() < MIN_PATH_LOGPROB:
                break
        kept = (tokens != UNKNOWN_TOKEN) & (
            path >= MIN_PATH_LOGPROB
        )  # dropping a node drops its descendants
        number = np.cumsum(kept) - 1
        return DraftNodes(number[parents[kept]][1:], tokens[kept][1:], logprobs[kept][1:], roots=1)

    def coupled_candidates(self, text: Text, above: Ints, level: Level, place: int) -> ScoredTokens:
        """Return the nodes of a level above temperature 0, ranked with the target's own noise.

        `above` (n,) holds the tokens of the distinct parents and `place` the position of the new
        tokens.
        """
        guesses, scores, sampling = self.tokens[above], self.scores[above], text.sampling
        if sampling.top_k or sampling.top_p < 1 or sampling.min_p:
            ask = SamplingInput(
                sampling, text.prompt, text.tokens, [range(place - len(text.tokens))], frozenset()
            )  # one position for all
            total = np.logaddexp.reduce(
                scores / np.float32(sampling.temperature), axis=1, keepdims=True
            )
            tokens, shares = rank_candidates(scores, guesses, total, ask, self.kept, self.kept)
            return tokens[level.rows, level.ranks], shares[level.rows, level.ranks]
        # The same without filters in fewer calls, which dominate the cost.
        chances = scores / sampling.temperature + noise.approx_gumbel(
            sampling.seed, [place], guesses
        )
        chances -= chances.max(axis=1, keepdims=True)
        total = np.log(np.exp(chances).sum(axis=1))
        found = (-chances).argsort(axis=1)[level.rows, level.ranks]
        return guesses[level.rows, found], chances[level.rows, found] - total[level.rows]


@cache
def tree_template(kept: int) -> tuple[list[Level], Ints]:
    """Return the MAX_NODES likeliest nodes by RANK_PROBABILITY, level by level, and the parents
    (n,).

    The parents begin with the root, which is its own parent 0.
    """
    found: list[tuple[int, ...]] = [()]  # each node as the ranks on its path
    ahead: list[tuple[float, tuple[int, ...]]] = [(-RANK_PROBABILITY[0], (0,))]
    while len(found) <= MAX_NODES:
        chance, way = heapq.heappop(ahead)
        found.append(way)
        if way[-1] + 1 < kept:
            heapq.heappush(
                ahead,
                (
                    chance / RANK_PROBABILITY[way[-1]] * RANK_PROBABILITY[way[-1] + 1],
                    (*way[:-1], way[-1] + 1),
                ),
            )
        if len(way) < MAX_DEPTH:
            heapq.heappush(ahead, (chance * RANK_PROBABILITY[0], (*way, 0)))
    found.sort(key=lambda way: (len(way), way))
    place = {way: number for number, way in enumerate(found)}
    parents = np.array([0, *(place[way[:-1]] for way in found[1:])])
    ranks = np.array([0, *(way[-1] for way in found[1:])])
    depths = np.array([len(way) for way in found])
    levels = []
    for depth in range(1, depths[-1] + 1):
        first, end = np.searchsorted(depths, [depth, depth + 1]).tolist()
        above, rows = np.unique(parents[first:end], return_inverse=True)
        levels.append(Level(slice(first, end), parents[first:end], ranks[first:end], above, rows))
    return levels, parents


def build(context: HeadContext) -> TokenRecycling:
    return TokenRecycling(context.model.vocabulary)
