"""Token recycling (Luo et al. 2024, arXiv 2408.08696): what the target thought likely after a token, the last time that it met it.

The first candidates of every row that was verified are kept by the row's token, also those of rows that were rejected, and the tree below
a new root is grown from them alone: a table is looked up, nothing is computed. One table serves all sessions of a target: it holds tokens
that the target thought likely in texts of others, and no text of more than two tokens can be read from it.
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

CANDIDATES_PER_TOKEN = 8  # candidates of a token
MAX_NODES = 48  # of a tree at most
MAX_DEPTH = 6
MAX_SAMPLED_DEPTH = 4  # above temperature 0: a level costs several times as much there, and what lies deeper is seldom right
MIN_PATH_LOGPROB = np.log(0.01)  # path probability below which no row is spent on a node
# How likely a token is the target's choice by its rank; it shapes the tree. Measured on the target that ships at temperature 0.
RANK_PROBABILITY = (0.4, 0.12, 0.06, 0.04, 0.03, 0.02, 0.02, 0.01)
UNKNOWN_TOKEN = -1

Ints = npt.NDArray[np.int64]
ScoredTokens = tuple[
    npt.NDArray[np.signedinteger[Any]], npt.NDArray[np.floating[Any]]
]  # token ids and logs of their shares


@dataclass(frozen=True, slots=True)
class Level:
    """The nodes of one depth: `nodes` are their places in the tree, each is child number ranks[i] of parents[i], that is above[rows[i]]."""

    nodes: slice
    parents: Ints
    ranks: Ints
    above: Ints
    rows: Ints


class TokenRecycling:
    """A Head for any target. `tokens` and `scores` (vocabulary + 1, kept): candidates by the token before them, most likely first."""

    output_spec = OutputSpec()

    def __init__(self, vocabulary: int, kept: int = CANDIDATES_PER_TOKEN) -> None:
        self.kept = min(kept, vocabulary)
        # The last row is that of UNKNOWN_TOKEN: nothing is known of what follows it.
        self.tokens = np.full((vocabulary + 1, self.kept), UNKNOWN_TOKEN, dtype=np.int64)
        self.scores = np.zeros((vocabulary + 1, self.kept), dtype=np.float32)

    def propose(self, seen: Sequence[VerifiedStep]) -> list[DraftNodes]:
        self.learn(seen)
        return [self.grow(one.text) for one in seen]

    def close(self, session: str) -> None:
        pass

    def learn(self, seen: Sequence[VerifiedStep]) -> None:
        """Where a token has several rows, those that were accepted count, and of them the last."""
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
        kept = (tokens != UNKNOWN_TOKEN) & (path >= MIN_PATH_LOGPROB)  # with a node go all below it
        number = np.cumsum(kept) - 1
        return DraftNodes(number[parents[kept]][1:], tokens[kept][1:], logprobs[kept][1:], roots=1)

    def coupled_candidates(self, text: Text, above: Ints, level: Level, place: int) -> ScoredTokens:
        """The nodes of a level whose parents are `above` (n,), each of its rank by the noise that the target will choose by at `place`."""
        guesses, scores, sampling = self.tokens[above], self.scores[above], text.sampling
        if sampling.top_k or sampling.top_p < 1 or sampling.min_p:
            ask = SamplingInput(
                sampling, text.prompt, text.tokens, [range(place - len(text.tokens))], frozenset()
            )  # one place for all of them
            total = np.logaddexp.reduce(
                scores / np.float32(sampling.temperature), axis=1, keepdims=True
            )
            tokens, shares = rank_candidates(scores, guesses, total, ask, self.kept, self.kept)
            return tokens[level.rows, level.ranks], shares[level.rows, level.ranks]
        # Without filters the same, in fewer operations: what it costs is calls, not numbers.
        chances = scores / sampling.temperature + noise.approx_gumbel(
            sampling.seed, [place], guesses
        )
        chances -= chances.max(axis=1, keepdims=True)
        total = np.log(np.exp(chances).sum(axis=1))
        found = (-chances).argsort(axis=1)[level.rows, level.ranks]
        return guesses[level.rows, found], chances[level.rows, found] - total[level.rows]


@cache
def tree_template(kept: int) -> tuple[list[Level], Ints]:
    """The MAX_NODES nodes that are likeliest by RANK_PROBABILITY, level by level, and the parent
    of each (n,), the root and its own parent 0 first."""
    found: list[tuple[int, ...]] = [()]  # by the ranks on the way to them
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
