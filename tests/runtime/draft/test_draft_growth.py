"""The draft engine grows trees of the requested shape, for many sessions in one pass."""

from collections.abc import Sequence

import numpy as np
import pytest

from runtime.core import limits
from runtime.core.draft_nodes import DraftNodes
from runtime.core.messages import (
    Style,
)
from runtime.draft.commands import GrowthDropped
from runtime.draft.draft_engine import MAX_PASS_ROWS
from runtime.drafters.base import ExpandRequest, Text
from tests.support.draft_engine import TEXT, Hand, V, commit, opened
from tests.support.harness import Known


def test_the_requested_passes_follow_each_commit() -> None:
    hand = Hand()
    hand.hear(opened(style=Style(passes=2)))
    assert hand.grow(9) == list(TEXT[5:7])
    hand.hear(commit(5, 1))
    assert hand.grow(9) == list(TEXT[7:9])
    hand.hear(commit(5, 1))  # late: nothing new to grow from
    assert hand.grow(9) == []
    hand.draft_engine.inbox.put(GrowthDropped(0, "s"))
    hand.hear()
    assert hand.grow(9) == list(TEXT[6:8])


def test_width_and_branches_as_asked_or_its_own() -> None:
    hand = Hand(width=2, branches=4)
    hand.hear(opened(), opened("wide", style=Style(width=3, branches=7)))
    hand.grow(1)
    found = {
        request.text.session: (len(request.leaves), request.branches)
        for request in hand.draft_engine.plan()
    }
    assert found == {"0/s": (2, 0), "0/wide": (3, 7)}


def test_a_large_growth_is_sent_in_messages_within_the_limits() -> None:
    hand = Hand(branches=400)
    hand.draft_engine.drafter = Known(TEXT, 1000, 400)
    hand.hear(opened())
    assert len(hand.grow(1)) == 400
    assert [len(draft.tokens) for draft in hand.drafts()] == [
        limits.DRAFT_NODES,
        400 - limits.DRAFT_NODES,
    ]


def test_all_sessions_are_expanded_in_one_call() -> None:
    class Counting(Known):
        calls = 0

        def expand(self, requests: Sequence[ExpandRequest]) -> list[DraftNodes]:
            self.calls += 1
            return super().expand(requests)

    hand = Hand()
    hand.draft_engine.drafter = counting = Counting(TEXT, V)
    hand.hear(opened("s"), opened("t", TEXT[:9]), opened("resting", share=(0, 0)))
    assert hand.grow(2) == list(TEXT[5:7])
    assert [draft.tokens.tolist() for draft in hand.drafts("t")] == [[TEXT[9]], [TEXT[10]]]
    assert counting.calls == 2


@pytest.mark.parametrize(("sessions", "rows"), [(1, 4), (3, 12), (6, MAX_PASS_ROWS), (30, 30)])
def test_rows_are_bounded_and_everyone_gets_one(sessions: int, rows: int) -> None:
    hand = Hand(width=4, branches=4)
    hand.hear(*(opened(f"s{n}") for n in range(sessions)))
    for _ in range(3):
        hand.draft_engine.step()
    requests = hand.draft_engine.plan()
    assert len(requests) == sessions
    assert sum(len(request.leaves) for request in requests) == rows


def test_reading_the_plan_changes_nothing() -> None:
    hand = Hand(width=4, branches=4)
    hand.hear(opened(), opened("t"))
    for _ in range(4):
        before = [
            (request.text.session, list(request.leaves)) for request in hand.draft_engine.plan()
        ]
        requests = hand.draft_engine.plan()
        assert [(request.text.session, list(request.leaves)) for request in requests] == before
        hand.draft_engine.insert_answers(requests, hand.draft_engine.expand(requests))
    assert hand.drafts()


def test_a_method_that_is_not_ready_is_asked_again() -> None:
    class Slow(Known):
        def __init__(self) -> None:
            super().__init__(TEXT, V)
            self.asked = 0

        def expand(self, requests: Sequence[ExpandRequest]) -> list[DraftNodes | None]:  # type: ignore[override]
            self.asked += 1
            return [
                None
                if self.asked < 4 and request.text.session == "0/s"
                else self.guess(request.text, request.leaves)
                for request in requests
            ]

    hand = Hand()
    hand.draft_engine.drafter = Slow()
    hand.hear(opened(style=Style(passes=1)), opened("t"))
    assert hand.grow(3) == []
    assert len(hand.drafts("t")) == 3
    assert hand.grow(2) == [TEXT[5]]


def test_a_drafter_that_is_sure_of_one_token_runs_as_deep_as_a_tree_may_be() -> None:
    class Sure(Known):
        """Four guesses, of which it believes the first."""

        def guess(self, text: Text, leaves: Sequence[int]) -> DraftNodes:
            found = super().guess(text, leaves)
            return DraftNodes(
                found.parents,
                found.tokens,
                np.where(found.scores > -1, -0.01, -8.0).astype(np.float32),
            )

    hand = Hand(width=4, branches=4)
    hand.draft_engine.drafter = Sure(TEXT, V, 4)
    hand.hear(opened(most=10**6))
    assert hand.grow(limits.TREE_DEPTH) == list(TEXT[5 : 5 + limits.TREE_DEPTH])


@pytest.mark.parametrize(("first", "passes", "deep"), [(0.97, 24, 24), (0.9, 18, 18)])
def test_a_tree_that_fills_up_goes_on_in_depth(first: float, passes: int, deep: int) -> None:
    """At width 4 a good drafter would be at the limit of nodes after a dozen passes."""

    class Even(Known):
        """Four guesses that fall off evenly."""

        def guess(self, text: Text, leaves: Sequence[int]) -> DraftNodes:
            found = super().guess(text, leaves)
            scores = np.log([first * (1 - first) ** rank for rank in range(4)] * len(leaves))
            return DraftNodes(found.parents, found.tokens, scores.astype(np.float32))

    hand = Hand(width=4, branches=4)
    hand.draft_engine.drafter = Even(TEXT, V, 4)
    hand.hear(opened(most=10**6))
    hand.grow(passes)
    assert max(hand.draft_engine.states["0/s"].tree.depth) >= deep
    assert max(len(draft.tokens) for draft in hand.drafts()) > 4
