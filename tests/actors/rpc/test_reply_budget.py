"""The budget lets in all that an honest drafter says, and a bounded part of a flood."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.rpc import reply_budget
from actors.rpc.reply_budget import (
    FRAME_BYTES,
    FRAMES_PER_EVENT,
    INITIAL_GRANT,
    MAX_SAVED_EVENTS,
    NODE_BYTES,
    ReplyBudget,
    grant_for,
)
from protos import drafting_codec
from runtime.core import limits
from runtime.core.features import FeatureRows
from runtime.core.messages import (
    DEFAULT_STYLE,
    Close,
    Commit,
    Draft,
    Event,
    Features,
    Open,
    Resync,
    Share,
    Style,
)
from runtime.draft.draft_engine import DraftEngine
from runtime.draft.draft_state import MAX_UNVERIFIED_NODES
from runtime.schedulers.fixed import Fixed
from tests.support.drafters import LOOPING, METHODS, PROMPT, built
from tests.support.fakes import chain, opening
from tests.support.harness import Known, Lockstep, asking, continued, engine_of

NAMES = ("s", "a name of some length", "\N{PILE OF POO}" * limits.NAME_LENGTH)
GRANT = grant_for("s", DEFAULT_STYLE, resting=False)


def committed(session: str = "s") -> Commit:
    return Commit(session, 1, 3, (8,), 0)


# Honest drafters


class Watched:
    """Puts a budget between an engine and a draft engine; counts frames and refused frames."""

    def __init__(self) -> None:
        self.budget, self.said, self.refused = ReplyBudget(), 0, list[str]()

    def __call__(self, message: Any) -> list[Any]:
        if not isinstance(message, Draft | Resync):
            self.budget.grant(message)
            return [message]
        frame = drafting_codec.encode_reply(message)
        self.said += 1
        if not self.budget.spend(1, len(frame)):
            left = f"{self.budget.frames} frames, {self.budget.size} bytes"
            self.refused.append(
                f"{type(message).__name__} of {len(frame)} bytes where {left} are left"
            )
        return [message]


@METHODS
@pytest.mark.parametrize("width", [1, 4, 64])
def test_an_honest_drafter_stays_within_the_budget(
    method: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drafter fills each tree after every commit and may save nothing between events."""
    monkeypatch.setattr(reply_budget, "MAX_SAVED_EVENTS", 1)
    watched = Watched()
    lockstep = Lockstep(
        engine_of(LOOPING),
        DraftEngine(built(method), "d", width),
        passes=MAX_UNVERIFIED_NODES,
        tamper=watched,
    )
    lockstep.run(*(asking(PROMPT, name, max_tokens=8) for name in NAMES))
    assert watched.refused == []
    assert watched.said > 0


@pytest.mark.parametrize(
    "style", [Style(64, 64, 32), Style(1, 1, 0), Style(1, 1, 7), Style(16, 64, 0), Style(64, 1, 3)]
)
@pytest.mark.parametrize("knows", [True, False])
def test_so_does_one_that_grows_as_a_schedule_asks(
    style: Style, knows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reply_budget, "MAX_SAVED_EVENTS", 1)
    monkeypatch.setattr(Fixed, "style", style)
    watched = Watched()
    text = continued(LOOPING, PROMPT, 40) if knows else [0]
    engine = DraftEngine(
        Known(text, LOOPING.vocabulary, branches=min(style.branches, LOOPING.vocabulary)), "d"
    )
    Lockstep(engine_of(LOOPING), engine, passes=64, tamper=watched).run(
        asking(PROMPT, max_tokens=12)
    )
    assert watched.refused == []
    assert watched.said > 0


# A flood


def spent(budget: ReplyBudget, frames: int, size: int) -> int:
    """How many such messages are let in."""
    count = 0
    while budget.spend(frames, size):
        count += 1
    return count


@pytest.mark.parametrize("size", [0, 40, 5000])
def test_after_each_event_a_flood_gets_in_what_the_event_grants(size: int) -> None:
    budget = ReplyBudget()
    budget.grant(opening())
    spent(budget, 1, size)
    for _ in range(1000):
        budget.grant(committed())
        assert spent(budget, 1, size) <= min(FRAMES_PER_EVENT, GRANT.size // max(1, size)) + 1
    assert GRANT.size <= 2 * limits.TREE_NODES * NODE_BYTES


def test_without_events_a_flood_ends() -> None:
    budget = ReplyBudget()
    assert spent(budget, 1, 1) == INITIAL_GRANT.frames
    assert spent(budget, 1, 1) == 0


def test_silence_saves_so_much_and_no_more() -> None:
    budget = ReplyBudget()
    budget.grant(opening())
    for _ in range(10 * MAX_SAVED_EVENTS):
        budget.grant(committed())
    assert (budget.frames, budget.size) == (
        MAX_SAVED_EVENTS * GRANT.frames,
        MAX_SAVED_EVENTS * GRANT.size,
    )


def test_a_resting_drafter_may_ask_for_the_text_and_no_more() -> None:
    budget = ReplyBudget()
    spent(budget, 1, 0)
    budget.grant(opening())
    budget.grant(Share("s", 0, 0))
    spent(budget, 1, 0)
    for _ in range(100):
        budget.grant(committed())
    assert spent(budget, 1, 0) == 0
    budget.grant(Share("s", 0, 0))
    assert spent(budget, 1, len(drafting_codec.encode_reply(Resync("s", "d")))) == 1
    budget.grant(Share("s", 0, 1))
    assert spent(budget, 1, 0) == FRAMES_PER_EVENT


def test_each_session_under_way_has_its_grants() -> None:
    budget = ReplyBudget()
    for number in range(8):
        budget.grant(opening(str(number)))
    spent(budget, 1, 0)
    for number in range(8):
        budget.grant(committed(str(number)))
    assert spent(budget, 1, 0) == 8 * FRAMES_PER_EVENT


def test_what_was_saved_for_many_sessions_goes_when_they_have_gone() -> None:
    """But not at once: what was said in answer to them is still on its way."""
    budget = ReplyBudget()
    names = [str(number) for number in range(8)]
    for name in names:
        budget.grant(opening(name))
    for name in names * MAX_SAVED_EVENTS:
        budget.grant(committed(name))
    saved = budget.frames
    assert saved == 8 * MAX_SAVED_EVENTS * FRAMES_PER_EVENT
    for name in names[1:]:
        budget.grant(Close(name))
    assert budget.frames == saved
    for _ in range(7 * MAX_SAVED_EVENTS):
        budget.grant(committed("0"))
    assert budget.frames == MAX_SAVED_EVENTS * FRAMES_PER_EVENT
    assert list(budget.styles) == ["0"]


EVENTS = st.one_of(
    st.builds(opening, st.sampled_from("ab")),
    st.builds(committed, st.sampled_from("ab")),
    st.builds(Share, st.sampled_from("ab"), st.just(0), st.sampled_from((0, 1, 2))),
    st.builds(Close, st.sampled_from("ab")),
)


@given(
    st.lists(st.one_of(EVENTS, st.tuples(st.integers(1, 100), st.integers(0, 40_000))), max_size=60)
)
def test_whatever_happens_no_more_comes_in_than_was_granted(
    happenings: list[Event | tuple[int, int]],
) -> None:
    budget, frames, size, events = ReplyBudget(), 0, 0, 0
    for one in happenings:
        if not isinstance(one, tuple):
            events += 1
            budget.grant(one)
        elif budget.spend(*one):
            frames, size = frames + one[0], size + one[1]
        assert 0 <= budget.frames <= FRAMES_PER_EVENT * (events + 1)
        assert budget.size >= 0
        assert frames <= FRAMES_PER_EVENT * (events + 1)
        assert size <= INITIAL_GRANT.size + GRANT.size * events


def test_growth_of_a_whole_tree_is_within_one_event_of_a_wide_schedule() -> None:
    budget = ReplyBudget()
    spent(budget, 1, 0)
    style = Style(width=64)
    opened = opening()
    budget.grant(Open("s", 1, opened.tokens, 1, opened.sampling, opened.share, style))
    draft = drafting_codec.encode_reply(chain("s", 1, 7, limits.DRAFT_NODES))
    assert spent(budget, 1, len(draft)) >= limits.TREE_NODES // limits.DRAFT_NODES


def test_a_message_is_let_in_whole_or_not_at_all() -> None:
    budget = ReplyBudget()
    frames, size = budget.frames, budget.size
    assert (frames, size) == INITIAL_GRANT
    assert not budget.spend(frames + 1, 0)
    assert not budget.spend(0, size + 1)
    assert (budget.frames, budget.size) == (frames, size)
    assert budget.spend(frames, size)
    assert (budget.frames, budget.size) == (0, 0)


@pytest.mark.parametrize(
    ("style", "nodes"),
    [(Style(), limits.TREE_NODES // 2), (Style(width=8), limits.TREE_NODES)],
)
def test_an_event_grants_frames_with_their_names_and_a_tree(style: Style, nodes: int) -> None:
    name = "größe"  # seven bytes
    frame = FRAME_BYTES + 7
    assert grant_for(name, style, True) == (1, frame)
    assert grant_for(name, style, False) == (
        FRAMES_PER_EVENT,
        FRAMES_PER_EVENT * frame + nodes * NODE_BYTES,
    )
    assert grant_for("\udcff", style, True) == (1, FRAME_BYTES + 1)
    assert grant_for(name, style, True).times(3) == (3, 3 * frame)


def test_features_and_ends_grant_nothing_and_an_end_forgets_its_session() -> None:
    budget = ReplyBudget()
    for name in "ab":
        budget.grant(opening(name))
        budget.grant(Share(name, 0, 0))
    assert budget.resting == {"a", "b"} == set(budget.styles)
    before = budget.frames, budget.size
    rows = FeatureRows(0, np.zeros((1, 4), np.uint16))
    budget.grant(Features("b", 0, rows))
    budget.grant(Close("a"))
    budget.grant(Close("never opened"))
    assert (budget.frames, budget.size) == before
    assert budget.resting == {"b"} == set(budget.styles)
