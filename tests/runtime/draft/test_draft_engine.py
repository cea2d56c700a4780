"""The draft engine follows the target, and its host is a link."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import cast

import pytest

from runtime.core import limits
from runtime.core.draft_nodes import DraftNodes
from runtime.core.links import DraftLink
from runtime.core.messages import (
    Close,
    Commit,
    Draft,
    Open,
    Resync,
    Share,
)
from runtime.core.node_keys import text_key
from runtime.core.sampling_params import SamplingParams
from runtime.draft.commands import Stop, StreamClosed
from runtime.draft.draft_host import DraftHost
from runtime.draft.draft_state import MAX_UNVERIFIED_NODES, MIN_PATH_LOGPROB
from runtime.drafters.base import Text
from runtime.drafters.model import ModelDrafter
from runtime.models.toy import ToyModel
from tests.contracts.link_contract import LinkContract
from tests.support.draft_engine import PROMPT, TEXT, Hand, V, commit, opened
from tests.support.harness import Known, children, hosted


class TestDraftHost(LinkContract):
    def drafter(self) -> AbstractAsyncContextManager[DraftLink]:
        return hosted(ModelDrafter(ToyModel()), width=4)

    def held(self, drafter: DraftLink) -> int:
        return len(cast(DraftHost, drafter).draft_engine.states)


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


def test_a_lost_commit_causes_one_resync() -> None:
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


def test_streams_have_separate_session_names() -> None:
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


# When it sends


def test_the_longer_it_grows_the_less_often_it_sends() -> None:
    hand = Hand()
    hand.hear(opened())
    assert hand.grow(21) == list(TEXT[5:25])
    assert [len(draft.tokens) for draft in hand.drafts()] == [1, 1, 1, 1, 2, 2, 3, 4, 5]
    hand.hear(commit(5, 1))
    assert hand.drafts()[-1].tokens.tolist() == [
        TEXT[25]
    ]  # was held back, and may live on under the new root
    assert hand.grow(2) == list(TEXT[26:28])


def test_nothing_is_held_back_when_it_stops_growing() -> None:
    hand = Hand()
    hand.hear(opened(most=11))
    assert hand.grow(20) == list(TEXT[5:15])


def test_a_session_without_a_pass_has_sent_everything() -> None:
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


def test_improbable_paths_are_not_grown() -> None:
    class Doubting(Known):
        def guess(self, text: Text, leaves: Sequence[int]) -> DraftNodes:
            return children([(leaf, 1, MIN_PATH_LOGPROB / 2.5) for leaf in leaves])

    hand = Hand()
    hand.draft_engine.drafter = Doubting(TEXT, V)
    hand.hear(opened())
    assert len(hand.grow(9)) == 3  # of a node that may become the root, the first child is kept


def test_a_share_holds_from_its_message_on() -> None:
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
