"""The table of what followed a token, and the tree that is read off it."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from runtime.core import limits
from runtime.core.node_keys import text_key
from runtime.core.sampler_reference import reference_sample
from runtime.core.sampling_params import SamplingParams
from runtime.core.tree import TokenTree
from runtime.drafters.base import Text
from runtime.heads.base import VerifiedStep
from runtime.heads.token_recycling import (
    CANDIDATES_PER_TOKEN,
    MAX_NODES,
    TokenRecycling,
    tree_template,
)
from runtime.models.base import PassOutput
from runtime.models.toy import ToyModel
from tests.support.harness import Lockstep, asking, plain
from tests.support.heads import headed


def make_seen(
    tokens: Sequence[int],
    row_tokens: Sequence[int],
    logits: np.ndarray,
    path: Sequence[int] = (0,),
    **sampling: Any,
) -> VerifiedStep:
    tree = TokenTree(text_key(tokens), tokens[-1], limits.TREE_NODES, limits.TREE_DEPTH)
    text = Text("s", list(tokens), len(tokens), SamplingParams(**sampling), tree)
    return VerifiedStep(
        text, np.asarray(row_tokens), path, PassOutput(torch.as_tensor(logits, dtype=torch.float32))
    )


def test_candidates_of_every_row_are_kept_and_the_accepted_rows_win() -> None:
    head, logits = TokenRecycling(30), np.random.default_rng(0).standard_normal((4, 30))
    head.learn([make_seen([1, 7, 7], [1, 7, 7, 9], logits, path=[0, 1])])
    order = np.argsort(-logits, axis=1)[:, :CANDIDATES_PER_TOKEN]
    for token, row in ((1, 0), (7, 1), (9, 3)):
        assert head.tokens[token].tolist() == order[row].tolist()
    assert (head.tokens[2] == -1).all()
    assert np.exp(head.scores[9]).sum() == pytest.approx(1.0, abs=1e-5)


def test_the_tree_follows_the_table() -> None:
    """Token t is followed by t + 1, t + 2, ...: a node's token is its parent's plus rank + 1."""
    head = TokenRecycling(64)
    logits = np.full((64, 64), -50.0)
    for token, rank in itertools.product(range(64), range(CANDIDATES_PER_TOKEN)):
        logits[token, (token + 1 + rank) % 64] = -rank
    head.learn([make_seen([0], range(64), logits, path=[0])])
    growth = head.grow(make_seen([0, 5], [0], logits).text)
    tokens = [5, *growth.tokens.tolist()]
    ranks = [
        token - tokens[parent] - 1
        for parent, token in zip(growth.parents.tolist(), growth.tokens.tolist(), strict=True)
    ]
    assert all(0 <= rank < CANDIDATES_PER_TOKEN for rank in ranks)
    assert ranks[0] == 0
    assert MAX_NODES >= len(growth.tokens) > 8
    said = growth.scores.tolist()
    assert all(
        said[place] == pytest.approx(float(head.scores[0][rank]))
        for place, rank in enumerate(ranks)
    )


def test_with_noise_it_ranks_by_the_noise_of_the_target() -> None:
    """It knows the very logits: its first child is the target's choice."""
    model, right = ToyModel(vocabulary=24, memory=1), 0
    for seed in range(6):
        request = asking([seed % 24], max_tokens=60, temperature=0.9, seed=seed, top_k=6)
        (found,) = Lockstep(headed(model, TokenRecycling(24), chooser=reference_sample)).run(
            request
        )
        assert found.said() == plain(model, request).said()
        right += found.stats.accepted
    assert right > 6 * 20


def test_the_shape_is_best_first() -> None:
    levels, parents = tree_template(CANDIDATES_PER_TOKEN)
    assert len(parents) == MAX_NODES + 1 == 1 + sum(len(level.ranks) for level in levels)
    assert all(parent < place for place, parent in enumerate(parents.tolist()) if place)
    assert (
        max(len(level.ranks) for level in levels) == len(levels[1].ranks)
        or len(levels[0].ranks) <= CANDIDATES_PER_TOKEN
    )
    assert tree_template(3)[0][0].ranks.tolist() == [0, 1, 2]
