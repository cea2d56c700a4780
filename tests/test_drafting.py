"""The drafter's loop by hand, and its host as a link."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import cast

import numpy as np
import pytest

from actors.grpc_edge import closing
from runtime import drafting, limits
from runtime.drafters.base import Children, Text
from runtime.drafters.model import ModelDrafter
from runtime.drafting import DraftHost
from runtime.errors import InvalidRequest
from runtime.grower import FLOOR, RUN_AHEAD, Gone, Grower, Heard, Stop, Unheard
from runtime.links import DraftLink
from runtime.messages import Close, Commit, Draft, Event, Open, Reply, Resync, Share
from runtime.models.toy import ToyModel
from runtime.sampling import Sampling
from runtime.tree import text_key
from tests.contracts import PATIENCE_S, LinkContract, draft_for, soon
from tests.fakes import Feed, opening
from tests.rig import Known, Mute, children, hosted

V = 64
TEXT = tuple(n * n % V for n in range(200))
PROMPT = TEXT[:5]


class TestDraftHost(LinkContract):
    def drafter(self) -> AbstractAsyncContextManager[DraftLink]:
        return hosted(ModelDrafter(ToyModel()), width=4)

    def held(self, drafter: DraftLink) -> int:
        return len(cast(DraftHost, drafter).grower.growing)


def opened(session: str = "s", tokens: Sequence[int] = PROMPT, epoch: int = 0, share: tuple[int, int] = (0, 1), most: int = 100) -> Open:
    return Open(session, epoch, tuple(tokens), len(PROMPT), Sampling(max_tokens=most), Share(session, *share))


def commit(base: int, count: int, session: str = "s", epoch: int = 0) -> Commit:
    return Commit(session, epoch, base, TEXT[base : base + count], text_key(TEXT[: base + count]))


class Hand:
    """A grower without a thread, and what it has sent."""

    def __init__(self, width: int = 1, branches: int = 1) -> None:
        self.sent: list[Reply] = []
        self.grower = Grower(Known(TEXT, V, branches), "d", width)

    def hear(self, *events: Event, stream: int = 0) -> None:
        for event in events:
            self.grower.inbox.put(Heard(stream, event, self.sent.append))
        assert self.grower.take_in(block=False)

    def grow(self, times: int, name: tuple[int, str] = (0, "s")) -> list[int]:
        """Tokens that were sent in so many passes."""
        before = len(self.sent)
        for _ in range(times):
            self.grower.grow(name)
        return [token for draft in self.sent[before:] if isinstance(draft, Draft) for token in draft.tokens.tolist()]

    def text(self, name: tuple[int, str] = (0, "s")) -> tuple[int, ...]:
        return tuple(self.grower.growing[name].tokens)


# Following the target


def test_it_grows_from_the_text_and_goes_on_from_where_a_commit_leaves_it() -> None:
    hand = Hand()
    hand.hear(opened())
    assert hand.grow(3) == list(TEXT[5:8])
    hand.hear(commit(5, 2))
    assert hand.grow(2) == list(TEXT[8:10])
    hand.hear(commit(7, 4))
    assert hand.grow(1) == [TEXT[11]]
    assert hand.grower.counters == {}
    parents = [int(draft.parents[0]) for draft in hand.sent if isinstance(draft, Draft)]
    assert parents == [text_key(TEXT[:n]) for n in (5, 6, 7, 8, 9, 11)]


def test_a_repeated_a_late_and_an_overlapping_commit() -> None:
    hand = Hand()
    hand.hear(opened(), commit(5, 2), commit(5, 2), commit(5, 1), commit(6, 3))
    assert hand.text() == TEXT[:9]
    assert hand.grower.counters == {"stale commit": 2}
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


@pytest.mark.parametrize("wrong", [Commit("s", 0, 5, (1, 2), 0), Commit("s", 0, 5, (63, 63), text_key(TEXT[:7]))])
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


def test_events_of_unknown_sessions_are_counted() -> None:
    hand = Hand()
    hand.hear(commit(5, 1), Share("s", 0, 2), Close("s"), Close("s"))
    assert hand.grower.counters == {"unknown session": 2}
    assert hand.grower.growing == {}


def test_streams_have_names_of_their_own() -> None:
    hand = Hand()
    hand.hear(opened(), opened("t"))
    hand.hear(opened(tokens=TEXT[:9]), stream=1)
    assert [hand.text(name) for name in ((0, "s"), (0, "t"), (1, "s"))] == [PROMPT, PROMPT, TEXT[:9]]
    hand.grower.inbox.put(Gone(0))
    hand.grower.take_in(block=False)
    assert list(hand.grower.growing) == [(1, "s")]


def test_stop_forgets_all() -> None:
    hand = Hand()
    hand.hear(opened())
    hand.grower.inbox.put(Stop())
    hand.grower.run()
    assert hand.grower.growing == {}


def test_sessions_are_bounded() -> None:
    hand = Hand()
    hand.hear(*(opened(f"s{n}") for n in range(limits.SESSIONS + 1)))
    assert len(hand.grower.growing) == limits.SESSIONS
    hand.hear(Open("empty", 0, (), 0, Sampling(), Share("empty", 0, 1)))
    assert hand.grower.counters == {"refused": 2}
    hand.hear(opened("s0", TEXT[:7]))
    assert hand.text((0, "s0")) == TEXT[:7]


# How far it goes


def test_it_stops_where_the_output_will_end() -> None:
    hand = Hand()
    hand.hear(opened(most=4))
    assert hand.grow(20) == list(TEXT[5:8])  # the fourth token is the target's own in any case


def test_it_stops_at_the_depth_of_a_tree() -> None:
    hand = Hand()
    hand.hear(opened())
    hand.grower.growing[0, "s"].opened = opened(most=10**6)
    assert len(hand.grow(200)) == limits.TREE_DEPTH


@pytest.mark.parametrize(("of", "most"), [(1, RUN_AHEAD), (2, limits.TREE_NODES // 3), (8, limits.TREE_NODES // 9)])
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
        def expand(self, text: Text, leaves: Sequence[int]) -> Children:
            return children([(leaf, 1, FLOOR / 2.5) for leaf in leaves])

    hand = Hand()
    hand.grower.drafter = Doubting(TEXT, V)
    hand.hear(opened())
    assert len(hand.grow(9)) == 3


def test_a_share_holds_from_when_it_is_told() -> None:
    alone, first, second = Hand(4, 4), Hand(4, 4), Hand(4, 4)
    for hand, index in ((first, 0), (second, 1)):
        hand.hear(opened(), Share("s", index, 2))
    alone.hear(opened())
    for hand in (alone, first, second):
        hand.grow(3)
    grown = [
        {(int(p), int(t)) for d in hand.sent if isinstance(d, Draft) for p, t in zip(d.parents, d.tokens, strict=True)}
        for hand in (first, second)
    ]
    root_children = {(text_key(PROMPT), token) for token in (TEXT[5], TEXT[5] + 1, TEXT[5] + 2, TEXT[5] + 3)}
    main = {(text_key(TEXT[:n]), (TEXT[n] + k) % V) for n in (5, 6, 7) for k in range(4)}
    assert root_children <= main <= grown[0] & grown[1]
    off = [set(nodes - main) for nodes in grown]
    assert off[0] or off[1]
    assert off[0].isdisjoint(off[1])


# What goes wrong


@pytest.mark.parametrize("error", [RuntimeError("no memory"), InvalidRequest("token 99 is not in the vocabulary"), ValueError("shape")])
def test_a_method_that_fails_gives_up_that_session_alone(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Known):
        def expand(self, text: Text, leaves: Sequence[int]) -> Children:
            if text.session == "0/bad":
                raise error
            return super().expand(text, leaves)

    hand = Hand()
    hand.grower.drafter = Failing(TEXT, V)
    hand.hear(opened("bad"), opened("good"))
    with caplog.at_level(logging.WARNING):
        assert hand.grow(1, (0, "bad")) == []
    assert hand.grow(1, (0, "good")) == [TEXT[5]]
    assert hand.grower.counters == {"failed": 1}
    assert "gives a session up" in caplog.text


def test_growth_that_was_dropped_is_sent_again() -> None:
    hand = Hand()
    hand.hear(opened())
    assert hand.grow(3) == list(TEXT[5:8])
    hand.grower.inbox.put(Unheard(0, "s"))
    hand.grower.inbox.put(Unheard(0, "over"))
    hand.grower.take_in(block=False)
    assert hand.grow(4) == list(TEXT[5:9])


def test_growth_that_nobody_fetches_is_dropped_but_no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader sleeps over a queue of two. It finds those two, and behind them the question that came last."""
    monkeypatch.setattr(drafting, "REPLIES_WAITING", 2)

    async def main() -> None:
        async with hosted(Known(TEXT, V)) as host:
            feed = Feed(opened(most=9))
            async with closing(host.speculate(feed)) as replies, asyncio.timeout(PATIENCE_S):
                await draft_for(replies, "s")
                await soon(lambda: host.grower.counters["dropped replies"] >= 5)
                feed.put(commit(9, 1))
                await soon(lambda: host.grower.counters["resync"] == 1)
                before = []
                async for reply in replies:
                    if isinstance(reply, Resync):
                        break
                    before.append(reply)
                assert 1 <= len(before) <= 2
                feed.put(opened(tokens=TEXT[:10], most=9))
                assert (await draft_for(replies, "s")).parents.tolist() == [text_key(TEXT[:10])]

    asyncio.run(main())


def test_a_clogged_link_becomes_useful_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What hangs on dropped growth would mean nothing to the target: once there is room all is sent from the root."""
    monkeypatch.setattr(drafting, "REPLIES_WAITING", 2)

    async def main() -> None:
        async with hosted(Known(TEXT, V)) as host, closing(host.speculate(Feed(opened(most=9)))) as replies:
            known = {text_key(PROMPT)}
            while text_key(TEXT[:13]) not in known:
                draft = await draft_for(replies, "s")
                await soon(lambda: host.grower.counters["dropped replies"] >= 5)
                parents = draft.parents.tolist()
                known.update(
                    text_key([token], parent) for parent, token in zip(parents, draft.tokens.tolist(), strict=True) if parent in known
                )

    asyncio.run(main())


def test_an_error_of_the_events_is_raised_to_the_reader() -> None:
    async def events() -> AsyncIterator[Event]:
        yield opening()
        raise ZeroDivisionError

    async def main() -> None:
        async with hosted(Mute()) as host:
            with pytest.raises(ZeroDivisionError):
                async for _ in host.speculate(events()):
                    pass
            await soon(lambda: not host.grower.growing)

    asyncio.run(main())


def test_a_silent_method_sends_nothing_and_rests() -> None:
    hand = Hand()
    hand.grower.drafter = Mute()
    hand.hear(opened())
    assert hand.grower.grow((0, "s")) is True
    assert hand.grower.grow((0, "s")) is False
    assert hand.sent == []
    assert np.array_equal(hand.grower.growing[0, "s"].tree.expanded, [True])
