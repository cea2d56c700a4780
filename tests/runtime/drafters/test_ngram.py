"""The drafting methods without a model: what n-grams find, and what noise spoils."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.core.draft_nodes import DraftNodes
from runtime.core.messages import Close, Request
from runtime.core.sampling_params import SamplingParams
from runtime.draft.draft_engine import DraftEngine
from runtime.drafters.base import ExpandRequest
from runtime.drafters.ngram import MAX_NGRAM, MIN_NGRAM, NgramDrafter, lookup
from runtime.drafters.noisy import NoisyDrafter
from tests.support.drafters import LOOPING, PROMPT, expanded, text_of
from tests.support.harness import Lockstep, engine_of
from tests.support.harness import children as guesses

# N-grams


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([1, 2, 3, 9, 1, 2, 3], (9, 3)),
        ([1, 2, 7, 5, 1, 2, 8, 0, 1, 2], (8, 2)),  # the latest place of those that agree in as much
        ([5, 1, 2, 7, 0, 1, 2, 8, 5, 1, 2], (7, 3)),  # more agreement before a later place
        ([4, 4, 4, 4, 4, 4], (4, MAX_NGRAM)),
        ([4, 4, 4], (4, MIN_NGRAM)),
        ([1, 2, 3], None),
        ([2, 1, 3, 1], None),  # one token is no evidence
        ([7], None),
        ([], None),
    ],
)
def test_lookup(tokens: list[int], found: tuple[int, int] | None) -> None:
    assert lookup(tokens) == found


@given(st.lists(st.integers(0, 2), max_size=40))
def test_lookup_is_the_longest_and_latest(tokens: list[int]) -> None:
    for length in range(MAX_NGRAM, MIN_NGRAM - 1, -1):
        places = [
            i
            for i in range(len(tokens) - length)
            if tokens[i : i + length] == tokens[len(tokens) - length :]
        ]
        if places and length < len(tokens):
            assert lookup(tokens) == (tokens[places[-1] + length], length)
            return
    assert lookup(tokens) is None


def test_ngrams_look_along_the_tree() -> None:
    text = text_of([1, 2, 3, 4, 5, 1, 2])
    drafter, leaf, written = NgramDrafter(), 0, []
    for _ in range(4):
        found = expanded(drafter, text, [leaf])
        written.append(int(found.tokens[0]))
        added = text.tree.add(leaf, written[-1], float(found.scores[0]))
        assert added is not None
        leaf = added
    assert written == [3, 4, 5, 1]


# Noise


class Same:
    """Says one token, whatever it is asked."""

    feature_spec = None

    def __init__(self) -> None:
        self.closed: list[str] = []

    def expand(self, requests: Sequence[ExpandRequest]) -> list[DraftNodes | None]:
        return [
            guesses([(leaf, 31, -0.5) for leaf in request.leaves]) if request.leaves else None
            for request in requests
        ]

    def close(self, session: str) -> None:
        self.closed.append(session)


@pytest.mark.parametrize(("wrong", "low", "high"), [(0.0, 0, 0), (0.3, 90, 150), (1.0, 400, 400)])
def test_a_share_of_the_guesses_is_spoilt_the_same_in_every_run(
    wrong: float, low: int, high: int
) -> None:
    text = text_of(PROMPT)
    for token in range(400):
        text.tree.add(0, token, -0.5)
    leaves = list(range(1, 401))
    inner = Same()
    noisy = NoisyDrafter(inner, 32, wrong)
    found = expanded(noisy, text, leaves)
    spoilt = found.tokens != 31
    assert low <= spoilt.sum() <= high
    assert set(found.tokens[spoilt].tolist()) <= {0}
    assert np.array_equal(found.parents, leaves)
    assert np.array_equal(
        found.tokens, expanded(NoisyDrafter(Same(), 32, wrong), text, leaves).tokens
    )
    assert noisy.expand([ExpandRequest(text, [])]) == [None]
    noisy.close("s")
    assert inner.closed == ["s"]


def test_the_sessions_of_a_request_are_closed_at_the_drafter() -> None:
    inner = Same()
    draft_engine = DraftEngine(inner, "d")
    Lockstep(engine_of(LOOPING), draft_engine).run(
        Request("x", tuple(PROMPT), SamplingParams(max_tokens=4))
    )
    assert inner.closed == ["0/x"]
    draft_engine.handle(0, Close("x"), lambda reply: None)
    assert inner.closed == ["0/x"]
    assert draft_engine.counters == {}
