"""The drafter's loop by hand, and its host as a link."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import cast

import numpy as np
import pytest

from runtime.core import limits
from runtime.core.draft_nodes import DraftNodes
from runtime.core.links import DraftLink
from runtime.core.messages import (
    DEFAULT_STYLE,
    Close,
    Commit,
    Draft,
    Event,
    Open,
    Reply,
    Resync,
    Share,
    Style,
)
from runtime.core.node_keys import text_key
from runtime.core.sampling_params import SamplingParams
from runtime.draft.commands import EventReceived, GrowthDropped, Stop, StreamClosed
from runtime.draft.draft_engine import MAX_PASS_ROWS, DraftEngine
from runtime.draft.draft_host import DraftHost
from runtime.draft.draft_state import MAX_UNVERIFIED_NODES, MIN_PATH_LOGPROB
from runtime.drafters.base import ExpandRequest, Text
from runtime.drafters.model import ModelDrafter
from runtime.models.toy import ToyModel
from tests.contracts.link_contract import LinkContract
from tests.support.harness import Known, children, hosted

V = 64
TEXT = tuple(n * n % V for n in range(200))
PROMPT = TEXT[:5]


class TestDraftHost(LinkContract):
    def drafter(self) -> AbstractAsyncContextManager[DraftLink]:
        return hosted(ModelDrafter(ToyModel()), width=4)

    def held(self, drafter: DraftLink) -> int:
        return len(cast(DraftHost, drafter).draft_engine.states)


def opened(
    session: str = "s",
    tokens: Sequence[int] = PROMPT,
    epoch: int = 0,
    share: tuple[int, int] = (0, 1),
    most: int = 100,
    style: Style = DEFAULT_STYLE,
) -> Open:
    return Open(
        session,
        epoch,
        tuple(tokens),
        len(PROMPT),
        SamplingParams(max_tokens=most),
        Share(session, *share),
        style,
    )


def commit(base: int, count: int, session: str = "s", epoch: int = 0) -> Commit:
    return Commit(session, epoch, base, TEXT[base : base + count], text_key(TEXT[: base + count]))


class Hand:
    """A draft engine without a thread, and what it has sent."""

    def __init__(self, width: int = 1, branches: int = 1) -> None:
        self.sent: list[Reply] = []
        self.draft_engine = DraftEngine(Known(TEXT, V, branches), "d", width)

    def hear(self, *events: Event, stream: int = 0) -> None:
        for event in events:
            self.draft_engine.inbox.put(EventReceived(stream, event, self.sent.append))
        assert self.draft_engine.receive(block=False)

    def grow(self, times: int, session: str = "s") -> list[int]:
        """Tokens of the session that were sent in so many passes."""
        before = len(self.sent)
        for _ in range(times):
            self.draft_engine.step()
        return [token for draft in self.drafts(session, before) for token in draft.tokens.tolist()]

    def drafts(self, session: str = "s", start: int = 0) -> list[Draft]:
        return [
            reply
            for reply in self.sent[start:]
            if isinstance(reply, Draft) and reply.session == session
        ]

    def text(self, name: str = "0/s") -> tuple[int, ...]:
        return tuple(self.draft_engine.states[name].tokens)


# Following the target


def test_it_grows_from_the_text_and_goes_on_from_where_a_commit_leaves_it() -> None:
    hand = Hand()
    hand.hear(opened())
    assert hand.grow(3) == list(TEXT[5:8])
    hand.hear(commit(5, 2))
    assert hand.grow(2) == list(TEXT[8:10])
    hand.hear(commit(7, 4))
    assert hand.grow(1) == [TEXT[11]]
    assert hand.draft_engine.counters == {}
    parents = [int(draft.parents[0]) for draft in hand.sent if isinstance(draft, Draft)]
    assert parents == [text_key(TEXT[:n]) for n in (5, 6, 7, 8, 9, 11)]


def test_a_repeated_a_late_and_an_overlapping_commit() -> None:
    hand = Hand()
    hand.hear(opened(), commit(5, 2), commit(5, 2), commit(5, 1), commit(6, 3))
    assert hand.text() == TEXT[:9]
    assert hand.draft_engine.counters == {"stale commit": 2}
    assert hand.grow(1) == [TEXT[9]]


def test_a_lost_commit_is_noticed_and_the_text_asked_for_once() -> None:
    hand = Hand()
    hand.hear(opened(), commit(7, 2))
    assert hand.sent == [Resync("s", "d")]
    assert hand.grow(1) == []
    hand.hear(commit(9, 1))
    assert len(hand.sent) == 1
    hand.hear(opened(tokens=TEXT[:10]))
    assert hand.grow(1) == [TEXT[10]]


@pytest.mark.parametrize(
    "wrong", [Commit("s", 0, 5, (1, 2), 0), Commit("s", 0, 5, (63, 63), text_key(TEXT[:7]))]
)
def test_a_commit_that_does_not_add_up_is_noticed(wrong: Commit) -> None:
    hand = Hand()
    hand.hear(opened(), wrong)
    assert hand.sent == [Resync("s", "d")]
    assert hand.grow(1) == []


def test_a_commit_of_another_epoch_changes_nothing() -> None:
    hand = Hand()
    hand.hear(opened(epoch=2), commit(5, 1, epoch=1))
    assert hand.text() == PROMPT
    hand.hear(commit(5, 1, epoch=2))
    assert hand.text() == TEXT[:6]


def test_an_opening_of_an_older_epoch_changes_nothing() -> None:
    hand = Hand()
    hand.hear(opened(epoch=2, tokens=TEXT[:7]), opened(epoch=1), commit(5, 3, epoch=1))
    (state,) = hand.draft_engine.states.values()
    assert (state.opened.epoch, tuple(state.tokens)) == (2, TEXT[:7])
    assert hand.draft_engine.counters == {"old epoch": 1, "stale commit": 1}
    hand.hear(opened(epoch=3))
    (state,) = hand.draft_engine.states.values()
    assert (state.opened.epoch, tuple(state.tokens)) == (3, PROMPT)


def test_events_of_unknown_sessions_are_counted() -> None:
    hand = Hand()
    hand.hear(commit(5, 1), Share("s", 0, 2), Close("s"), Close("s"))
    assert hand.draft_engine.counters == {"unknown session": 2}
    assert hand.draft_engine.states == {}


def test_streams_have_names_of_their_own() -> None:
    hand = Hand()
    hand.hear(opened(), opened("t"))
    hand.hear(opened(tokens=TEXT[:9]), stream=1)
    assert [hand.text(name) for name in ("0/s", "0/t", "1/s")] == [PROMPT, PROMPT, TEXT[:9]]
    hand.draft_engine.inbox.put(StreamClosed(0))
    hand.draft_engine.receive(block=False)
    assert list(hand.draft_engine.states) == ["1/s"]


def test_stop_forgets_all() -> None:
    hand = Hand()
    hand.hear(opened())
    hand.draft_engine.inbox.put(Stop())
    hand.draft_engine.run()
    assert hand.draft_engine.states == {}


def test_sessions_are_bounded() -> None:
    hand = Hand()
    hand.hear(*(opened(f"s{n}") for n in range(limits.SESSIONS + 1)))
    assert len(hand.draft_engine.states) == limits.SESSIONS
    hand.hear(Open("empty", 0, (), 0, SamplingParams(), Share("empty", 0, 1)))
    assert hand.draft_engine.counters == {"refused": 2}
    hand.hear(opened("s0", TEXT[:7]))
    assert hand.text("0/s0") == TEXT[:7]


# When it says so


def test_the_longer_it_grows_the_rarer_it_speaks() -> None:
    hand = Hand()
    hand.hear(opened())
    assert hand.grow(21) == list(TEXT[5:25])
    assert [len(draft.tokens) for draft in hand.drafts()] == [1, 1, 1, 1, 2, 2, 3, 4, 5]
    hand.hear(commit(5, 1))
    assert hand.drafts()[-1].tokens.tolist() == [
        TEXT[25]
    ]  # was held back, and may live on under the new root
    assert hand.grow(2) == list(TEXT[26:28])


def test_nothing_is_held_back_when_there_is_nothing_more_to_say() -> None:
    hand = Hand()
    hand.hear(opened(most=11))
    assert hand.grow(20) == list(TEXT[5:15])


def test_a_session_that_gets_no_pass_has_said_all() -> None:
    hand = Hand()
    hand.hear(opened(most=11), opened("t"))
    hand.grow(20)
    assert [token for draft in hand.drafts() for token in draft.tokens.tolist()] == list(TEXT[5:15])


# How far it goes


def test_it_stops_where_the_output_will_end() -> None:
    hand = Hand()
    hand.hear(opened(most=4))
    assert hand.grow(20) == list(TEXT[5:8])  # the fourth token is the target's own in any case


def test_it_stops_at_the_depth_of_a_tree() -> None:
    hand = Hand()
    hand.hear(opened())
    hand.draft_engine.states["0/s"].opened = opened(most=10**6)
    assert len(hand.grow(200)) == limits.TREE_DEPTH


@pytest.mark.parametrize(
    ("of", "most"),
    [(1, MAX_UNVERIFIED_NODES), (8, limits.TREE_NODES // 9), (16, limits.TREE_NODES // 17)],
)
def test_run_ahead_is_bounded_so_that_the_mirror_holds_the_trees_of_all(of: int, most: int) -> None:
    hand = Hand(width=4, branches=4)
    hand.hear(opened(share=(0, of)))
    nodes = len(hand.grow(500))
    assert most - 4 <= nodes <= most + 16
    assert of * nodes <= limits.TREE_NODES + of * 20
    hand.hear(commit(5, 60))
    assert len(hand.grow(500)) >= most - 4


def test_what_is_hardly_possible_is_not_grown() -> None:
    class Doubting(Known):
        def guess(self, text: Text, leaves: Sequence[int]) -> DraftNodes:
            return children([(leaf, 1, MIN_PATH_LOGPROB / 2.5) for leaf in leaves])

    hand = Hand()
    hand.draft_engine.drafter = Doubting(TEXT, V)
    hand.hear(opened())
    assert len(hand.grow(9)) == 3  # of a node that may become the root, the first child is kept


def test_a_share_holds_from_when_it_is_told() -> None:
    alone, first, second = Hand(4, 4), Hand(4, 4), Hand(4, 4)
    for hand, index in ((first, 0), (second, 1)):
        hand.hear(opened(), Share("s", index, 2))
    alone.hear(opened())
    for hand in (alone, first, second):
        hand.grow(3)
    grown = [
        {
            (int(p), int(t))
            for d in hand.sent
            if isinstance(d, Draft)
            for p, t in zip(d.parents, d.tokens, strict=True)
        }
        for hand in (first, second)
    ]
    root_children = {
        (text_key(PROMPT), token) for token in (TEXT[5], TEXT[5] + 1, TEXT[5] + 2, TEXT[5] + 3)
    }
    main = {(text_key(TEXT[:n]), (TEXT[n] + k) % V) for n in (5, 6, 7) for k in range(4)}
    assert root_children <= main <= grown[0] & grown[1]
    off = [set(nodes - main) for nodes in grown]
    assert off[0] or off[1]
    assert off[0].isdisjoint(off[1])


def test_without_a_share_it_rests_and_follows_until_it_gets_one() -> None:
    hand = Hand()
    hand.hear(opened(share=(0, 0)), commit(5, 2))
    assert hand.grow(2) == []
    hand.hear(Share("s", 0, 1))
    assert hand.grow(1) == [TEXT[7]]
    hand.hear(Share("s", 0, 0), commit(7, 1))
    assert hand.grow(1) == []
    hand.hear(Share("s", 1, 2), commit(8, 3))
    assert hand.text() == TEXT[:11]
    assert hand.grow(1) == [TEXT[11]]
    assert hand.draft_engine.counters == {}


# How it is asked to grow


def test_so_many_passes_after_each_commit() -> None:
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


def test_a_growth_of_any_size_goes_out_in_messages_that_a_target_takes() -> None:
    hand = Hand(branches=400)
    hand.draft_engine.drafter = Known(TEXT, 1000, 400)
    hand.hear(opened())
    assert len(hand.grow(1)) == 400
    assert [len(draft.tokens) for draft in hand.drafts()] == [
        limits.DRAFT_NODES,
        400 - limits.DRAFT_NODES,
    ]


# Several sessions in one pass


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


def test_a_look_at_the_plan_changes_nothing() -> None:
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


def test_a_method_that_asks_for_patience_is_asked_again() -> None:
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


# How far ahead


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
