"""How far the EAGLE head guesses: best nodes first, as long as a pass is worth its time."""

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest

from runtime.core.draft_nodes import DraftNodes
from runtime.core.features import FeatureSpec
from runtime.drafters.base import ExpandRequest
from runtime.drafters.eagle import EagleDrafter
from runtime.heads import eagle_head
from runtime.heads.base import VerifiedStep
from runtime.heads.eagle_head import EagleHead
from tests.support.drafters import text_of

PASS, REST = 0.001, 0.010  # seconds of a pass, and of the target's part of a step


class Scripted:
    """Guesses two children of each leaf, with fixed probabilities; each pass takes PASS."""

    feature_spec = FeatureSpec((0,))

    def __init__(self, *probabilities: float) -> None:
        self.scores = [math.log(one) for one in probabilities]
        self.now, self.leaves = 0.0, list[list[int]]()

    def expand(self, requests: Sequence[ExpandRequest]) -> list[DraftNodes]:
        self.now += PASS
        self.leaves += [list(request.leaves) for request in requests]
        count = len(self.scores)
        return [
            DraftNodes(
                np.repeat(np.array(request.leaves, np.int32), count),
                np.tile(np.arange(count, dtype=np.int32), len(request.leaves)),
                np.tile(np.array(self.scores, np.float32), len(request.leaves)),
            )
            for request in requests
        ]


def run(drafter: Scripted, steps: int, tokens: int = 1, texts: int = 1) -> list[list[int]]:
    """Returns the number of passes of each step, and the nodes of its first text."""
    head = EagleHead(cast(EagleDrafter, drafter), lambda: drafter.now)
    found = []
    for _ in range(steps):
        before = len(drafter.leaves)
        seen: list[Any] = [
            VerifiedStep(text_of([1, 2], str(text)), np.array([2]), range(tokens), cast(Any, None))
            for text in range(texts)
        ]
        nodes = head.propose(seen)
        found.append([(len(drafter.leaves) - before) // texts, len(nodes[0].tokens)])
        drafter.now += REST
    return found


def test_two_passes_before_any_rate_is_known() -> None:
    assert run(Scripted(0.9, 0.05), 1) == [[eagle_head.FIRST_PASSES, 6]]


def test_sure_guesses_go_deeper_than_doubtful_ones() -> None:
    """A pass of 1 ms is worth about 0.1 tokens, and must bring PASS_MARGIN times that."""
    sure, doubtful = run(Scripted(0.95, 0.04), 20)[-1], run(Scripted(0.06, 0.04), 20)[-1]
    assert sure[0] == eagle_head.MAX_PASSES
    assert doubtful == [1, 2]


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_pass_must_bring_more_where_the_target_is_fast(tokens: int) -> None:
    passes = run(Scripted(0.8, 0.0001), 40, tokens)[-1][0]
    step = REST + passes * PASS
    worth = eagle_head.PASS_MARGIN * tokens / step * PASS
    assert 0.8 ** (passes - 1) > worth - 0.05
    assert passes == eagle_head.MAX_PASSES or 0.8**passes < worth + 0.05


def test_the_likeliest_nodes_are_expanded_first_wherever_they_hang() -> None:
    drafter = Scripted(0.5, 0.45)
    run(drafter, 1)
    assert drafter.leaves == [[0], [1, 2]]
    tree = text_of([1, 2], "s").tree
    assert eagle_head.insert(tree, nodes([0, 0], [0.6, 0.3])) == [1, 2]
    assert eagle_head.insert(tree, nodes([1], [0.2])) == [2, 3]


def nodes(parents: list[int], probabilities: list[float]) -> DraftNodes:
    tokens = np.arange(len(parents), dtype=np.int32)
    scores = np.log(np.array(probabilities, np.float32))
    return DraftNodes(np.array(parents, np.int32), tokens, scores)


def test_a_pause_between_steps_is_no_slow_step() -> None:
    drafter = Scripted(0.6, 0.3)
    head = EagleHead(cast(EagleDrafter, drafter), lambda: drafter.now)
    head.observe_step(0.0, 2)
    head.observe_step(0.01, 2)
    head.observe_step(100.0, 2)
    head.observe_step(100.01, 2)
    assert head.step_seconds == pytest.approx(0.01)
    assert head.tokens == 2


def test_several_texts_share_a_pass() -> None:
    assert (
        run(Scripted(0.3, 0.2), 20, texts=1)[-1][0] <= run(Scripted(0.3, 0.2), 20, texts=6)[-1][0]
    )
