"""What goes wrong at a drafter, and what becomes of it."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence

import numpy as np
import pytest

from actors.rpc.common import closing
from runtime.core.draft_nodes import DraftNodes
from runtime.core.errors import InvalidRequest
from runtime.core.messages import Draft, Event, Resync
from runtime.core.node_keys import text_key
from runtime.draft import draft_host
from runtime.draft.commands import GrowthDropped
from runtime.drafters.base import ExpandRequest, Text
from tests.contracts.link_contract import PATIENCE_S, draft_for, soon
from tests.support.draft_engine import PROMPT, TEXT, Hand, V, commit, opened
from tests.support.fakes import Feed, opening
from tests.support.harness import Known, Mute, hosted

# What goes wrong


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("no memory"),
        InvalidRequest("token 99 is not in the vocabulary"),
        ValueError("shape"),
    ],
)
def test_a_method_that_fails_gives_up_that_session_alone(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Known):
        def guess(self, text: Text, leaves: Sequence[int]) -> DraftNodes:
            if text.session == "0/bad":
                raise error
            return super().guess(text, leaves)

    hand = Hand()
    hand.draft_engine.drafter = Failing(TEXT, V)
    hand.hear(opened("good"), opened("bad"), opened("s"))
    with caplog.at_level(logging.WARNING):
        hand.grow(1)
    assert [draft.session for draft in hand.sent if isinstance(draft, Draft)] == ["good", "s"]
    assert list(hand.draft_engine.states) == ["0/good", "0/s"]
    assert hand.grow(1) == [TEXT[6]]
    assert hand.draft_engine.counters == {"failed": 1}
    assert "gives a session up" in caplog.text


def answer(
    parents: Sequence[int], tokens: Sequence[int], scores: Sequence[float], roots: int | None = None
) -> DraftNodes:
    return DraftNodes(
        np.array(parents, np.int32), np.array(tokens, np.int32), np.array(scores, np.float32), roots
    )


@pytest.mark.parametrize(
    "nonsense",
    [
        answer([99], [1], [-0.1]),
        answer([0, 0], [1], [-0.1]),
        answer([0], [1], [-0.1, -0.2]),
        answer([0, 1 + 7], [1, 1], [-0.1, -0.1], roots=1),
        answer([0, 2, 1], [1, 1, 1], [-0.1, -0.1, -0.1], roots=1),
    ],
    ids=[
        "a parent that is not there",
        "too few tokens",
        "too many scores",
        "below what is not there",
        "below itself",
    ],
)
def test_an_answer_that_can_be_none_gives_up_that_session_alone(nonsense: DraftNodes) -> None:
    class Confused(Known):
        def guess(self, text: Text, leaves: Sequence[int]) -> DraftNodes:
            return nonsense if text.session == "0/bad" else super().guess(text, leaves)

    hand = Hand()
    hand.draft_engine.drafter = Confused(TEXT, V)
    hand.hear(opened("bad"), opened("s"))
    assert hand.grow(2) == list(TEXT[5:7])
    assert list(hand.draft_engine.states) == ["0/s"]
    assert hand.draft_engine.counters == {"failed": 1}


def test_a_method_that_answers_too_little_is_asked_about_each_session_alone() -> None:
    class Terse(Known):
        def expand(self, requests: Sequence[ExpandRequest]) -> list[DraftNodes]:
            return super().expand(requests)[:1]

    hand = Hand()
    hand.draft_engine.drafter = Terse(TEXT, V)
    hand.hear(opened("other"), opened("s"))
    assert hand.grow(1) == [TEXT[5]]
    assert list(hand.draft_engine.states) == ["0/other", "0/s"]
    assert hand.draft_engine.counters == {}


def test_growth_that_was_dropped_is_sent_again() -> None:
    hand = Hand()
    hand.hear(opened())
    assert hand.grow(3) == list(TEXT[5:8])
    hand.draft_engine.inbox.put(GrowthDropped(0, "s"))
    hand.draft_engine.inbox.put(GrowthDropped(0, "over"))
    hand.draft_engine.receive(block=False)
    assert hand.grow(4) == list(TEXT[5:9])


def test_growth_that_nobody_fetches_is_dropped_but_no_question(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reader of a queue of two sleeps; it finds two replies and the last question."""
    monkeypatch.setattr(draft_host, "MAX_UNREAD_REPLIES", 2)

    async def main() -> None:
        async with hosted(Known(TEXT, V)) as host:
            feed = Feed(opened(most=9))
            async with closing(host.speculate(feed)) as replies, asyncio.timeout(PATIENCE_S):
                await draft_for(replies, "s")
                await soon(lambda: host.draft_engine.counters["dropped replies"] >= 2)
                feed.put(commit(9, 1))
                await soon(lambda: host.draft_engine.counters["resync"] == 1)
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
    """Nodes below dropped growth are useless, so everything is sent again from the root."""
    monkeypatch.setattr(draft_host, "MAX_UNREAD_REPLIES", 2)

    async def main() -> None:
        async with (
            hosted(Known(TEXT, V)) as host,
            closing(host.speculate(Feed(opened(most=9)))) as replies,
        ):
            known = {text_key(PROMPT)}
            while text_key(TEXT[:13]) not in known:
                draft = await draft_for(replies, "s")
                await soon(lambda: host.draft_engine.counters["dropped replies"] >= 2)
                parents = draft.parents.tolist()
                known.update(
                    text_key([token], parent)
                    for parent, token in zip(parents, draft.tokens.tolist(), strict=True)
                    if parent in known
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
            await soon(lambda: not host.draft_engine.states)

    asyncio.run(main())


def test_a_silent_method_sends_nothing_and_rests() -> None:
    hand = Hand()
    hand.draft_engine.drafter = Mute()
    hand.hear(opened())
    assert hand.draft_engine.step() is True
    assert hand.draft_engine.step() is False
    assert hand.sent == []
    assert np.array_equal(hand.draft_engine.states["0/s"].tree.expanded, [True])
