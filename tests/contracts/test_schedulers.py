"""What any scheduler owes the engine, for any views; and the naive twins exactly."""

import math
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime.schedulers
from runtime.core.messages import Round, Style
from runtime.schedulers import living
from runtime.schedulers.amusd import Amusd
from runtime.schedulers.base import Plan, Scheduler, SessionView
from runtime.schedulers.fixed import Fixed
from runtime.schedulers.pearl import Pearl, gamma
from runtime.schedulers.plain import Plain
from runtime.schedulers.sync import Sync

PATIENCE_FACTOR = 0.02

MAKERS: dict[str, Callable[[], Scheduler]] = {  # by file
    "amusd": lambda: Amusd(0.004),
    "fixed": lambda: Fixed(8, PATIENCE_FACTOR),
    "living": lambda: living.Living({rows: 0.01 + 0.0005 * rows for rows in living.MEASURED_ROWS}),
    "pearl": lambda: Pearl(5, 0.004),
    "plain": Plain,
    "sync": lambda: Sync(4, 2, 3, 12, 0.004),
}
SHARED = {"base", "blocking"}  # files that are no policy


def test_every_file_is_under_contract() -> None:
    assert (
        MAKERS.keys()
        == {module.name for module in pkgutil.iter_modules(runtime.schedulers.__path__)} - SHARED
    )


@dataclass(frozen=True, slots=True)
class Growth:
    delay: float
    first: bool
    leaves: int


SECONDS = st.floats(1e-5, 0.5)
ROUNDS = st.builds(
    lambda width, accepted, hit, waited, computed, other: Round(
        "s", 0, width, min(accepted, width), hit, waited, computed, other
    ),
    st.integers(0, 80),
    st.integers(0, 80),
    st.booleans(),
    st.floats(0.0, 0.5),
    SECONDS,
    st.floats(0.0, 0.1),
)
STEPS = st.lists(ROUNDS, min_size=1, max_size=3).map(
    lambda rounds: [replace(done, computed=rounds[0].computed) for done in rounds]
)
HISTORIES = st.lists(
    st.one_of(STEPS, st.builds(Growth, SECONDS, st.booleans(), st.integers(0, 40))), max_size=40
)
History = list[list[Round] | Growth]
SCHEDULERS = pytest.mark.parametrize("make", list(MAKERS.values()), ids=list(MAKERS))


@st.composite
def trees(draw: st.DrawFn, drafters: st.SearchStrategy[int]) -> SessionView:
    """A session as it comes to its step: nothing waited so far."""
    gains = sorted(draw(st.lists(st.floats(0.0, 1.0), max_size=80)), reverse=True)
    leaves = gains[len(gains) // 2 :] or [1.0]
    return SessionView(
        np.asarray(gains, dtype=np.float64),
        np.asarray(leaves, dtype=np.float64),
        depth=draw(st.integers(1, len(gains))) if gains else 0,
        drafters=draw(drafters),
        hit=draw(st.booleans()),
        width=draw(st.integers(0, 80)),
        since_commit=draw(st.floats(0.0, 0.5)),
        growths=draw(st.integers(0, 80)) if gains else 0,
    )


def later(views: Sequence[SessionView], seconds: float) -> list[SessionView]:
    """Nothing has arrived meanwhile."""
    return [
        replace(
            view,
            waited=view.waited + seconds,
            since_commit=view.since_commit + seconds,
            since_growth=view.since_growth + seconds,
        )
        for view in views
    ]


def taught(make: Callable[[], Scheduler], history: History) -> Scheduler:
    scheduler = make()
    for seen in history:
        if isinstance(seen, Growth):
            scheduler.on_growth(seen.delay, seen.first, seen.leaves)
        else:
            scheduler.observe(seen)
    return scheduler


def check(plan: Plan, views: Sequence[SessionView]) -> None:
    assert len(plan.rows) == len(views)
    for rows, view in zip(plan.rows, views, strict=True):
        assert isinstance(rows, int)
        assert 0 <= rows <= len(view.gains)
    assert 0.0 <= plan.wait < math.inf


@SCHEDULERS
def test_a_style_asks_for_something_or_leaves_the_choice(make: Callable[[], Scheduler]) -> None:
    style = make().style
    assert isinstance(style, Style)
    assert min(style.width, style.branches, style.passes) >= 0


@SCHEDULERS
@settings(max_examples=50)
@given(
    history=HISTORIES,
    views=st.lists(trees(st.integers(0, 4)), min_size=1, max_size=4),
    waited=st.floats(0.0, 2.0),
)
def test_a_plan_is_sane_for_any_views(
    make: Callable[[], Scheduler], history: History, views: list[SessionView], waited: float
) -> None:
    plan = taught(make, history).plan(later(views, waited))
    check(plan, views)
    if all(view.drafters == 0 for view in views):
        assert plan.wait == 0.0


@SCHEDULERS
@settings(max_examples=50)
@given(history=HISTORIES, views=st.lists(trees(st.integers(0, 2)), min_size=1, max_size=4))
def test_patience_with_silent_drafters_ends(
    make: Callable[[], Scheduler], history: History, views: list[SessionView]
) -> None:
    """Asked after each wait, it steps within four times the slowest growth or step."""
    scheduler, waited = taught(make, history), 0.0
    slowest = max(
        [
            PATIENCE_FACTOR,
            *(seen.delay if isinstance(seen, Growth) else seen[0].computed for seen in history),
        ]
    )
    for _ in range(50):
        plan = scheduler.plan(views)
        check(plan, views)
        if plan.wait == 0.0:
            return
        waited += plan.wait
        views = later(views, plan.wait)
        assert waited <= 4.001 * slowest
    pytest.fail("it has waited fifty times")


@SCHEDULERS
@settings(max_examples=50)
@given(history=HISTORIES, views=st.lists(trees(st.integers(0, 4)), min_size=1, max_size=4))
def test_a_plan_is_a_pure_function_of_what_was_seen(
    make: Callable[[], Scheduler], history: History, views: list[SessionView]
) -> None:
    scheduler = taught(make, history)
    assert scheduler.plan(views) == scheduler.plan(views) == taught(make, history).plan(views)


def view(nodes: int = 0, drafters: int = 1, waited: float = 0.0, **others: float) -> SessionView:
    """A chain of so many nodes."""
    gains = 0.9 ** np.arange(1.0, nodes + 1)
    return SessionView(
        gains,
        gains[-1:] if nodes else np.ones(1),
        depth=nodes,
        drafters=drafters,
        waited=waited,
        **others,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("views", "plan"),
    [
        ([view(drafters=0)], Plan((0,))),
        ([view()], Plan((0,), PATIENCE_FACTOR)),
        ([view(waited=0.015)], Plan((0,), PATIENCE_FACTOR - 0.015)),
        ([view(waited=PATIENCE_FACTOR)], Plan((0,))),
        ([view(1)], Plan((1,))),
        ([view(9, drafters=0)], Plan((8,))),
        (
            [view(9), view(waited=0.015), view(3), view(waited=0.005)],
            Plan((8, 0, 3, 0), PATIENCE_FACTOR - 0.005),
        ),
        ([view(9), view(waited=0.03), view(3)], Plan((8, 0, 3))),
    ],
)
def test_fixed(views: list[SessionView], plan: Plan) -> None:
    scheduler = Fixed(8, PATIENCE_FACTOR)
    scheduler.observe([Round("s", 0, 8, 0, False, 0.0, 9.0, 0.0)])
    scheduler.on_growth(9.0, True, 1)
    assert scheduler.plan(views) == plan


def test_plain_verifies_nothing_and_never_waits() -> None:
    assert Plain().plan([view(), view(9)]) == Plan((0, 0))


CHAIN = Sync(1, 1, 4, 4, 1.0)
TREE = Sync(2, 2, 2, 5, 1.0)


@pytest.mark.parametrize(
    ("scheduler", "views", "plan"),
    [
        # the first growth may take four times the usual, and every further one again
        (CHAIN, [view(since_commit=1.5, since_growth=9.0)], Plan((0,), 2.5)),
        (CHAIN, [view(3, growths=3, since_growth=0.5)], Plan((3,), 3.5)),
        (CHAIN, [view(3, growths=3, since_growth=4.0)], Plan((3,))),
        (CHAIN, [view(4, growths=4)], Plan((4,))),
        (CHAIN, [view(3, drafters=0)], Plan((3,))),
        (CHAIN, [view(4, growths=1, hit=True)], Plan((4,))),  # long enough, whenever that grew
        # A tree is finished after its growths, at any depth; what a re-root left does not count.
        (TREE, [view(9, growths=1)], Plan((5,), 4.0)),
        (TREE, [view(2, growths=2)], Plan((2,))),
        # one step for all: the session with most patience left decides
        (
            CHAIN,
            [view(4, growths=4), view(since_commit=3.0), view(1, growths=1, since_growth=2.0)],
            Plan((4, 0, 1), 2.0),
        ),
        (CHAIN, [view(4, growths=4), view(since_commit=9.0), view(2, drafters=0)], Plan((4, 0, 2))),
        # two tokens of the chain at least, then all of it
        (Amusd(1.0), [view(1, growths=1)], Plan((1,), 4.0)),
        (Amusd(1.0), [view(2, growths=2)], Plan((2,))),
        (Amusd(1.0), [view(64, growths=64), view(9)], Plan((64, 9))),
        (Amusd(1.0, rows=8), [view(64)], Plan((8,))),
        (Amusd(1.0, least=0), [view(), view(1)], Plan((0, 1))),
        # After a rejection: at once, without rows. After acceptance: all but one of the tokens.
        (Pearl(4, 1.0), [view(), view(2)], Plan((0, 0))),
        (Pearl(4, 1.0), [view(2, hit=True)], Plan((2,), 4.0)),
        (Pearl(4, 1.0), [view(2, hit=True, since_commit=4.0)], Plan((2,))),
        (Pearl(4, 1.0), [view(7, hit=True), view(1)], Plan((3, 0))),
        (Pearl(1, 1.0), [view(hit=True)], Plan((0,))),
    ],
)
def test_taking_turns(scheduler: Scheduler, views: list[SessionView], plan: Plan) -> None:
    assert scheduler.plan(views) == plan


def test_patience_follows_the_delays_seen_and_for_an_empty_tree_the_steps() -> None:
    scheduler = Sync(1, 1, 4, 4, 1.0)
    for _ in range(200):
        scheduler.on_growth(2.0, True, 1)
        scheduler.on_growth(3.0, False, 1)
        scheduler.observe([Round("s", 0, 8, 0, False, 0.0, 5.0, 0.0)])
    assert scheduler.plan([view()]).wait == pytest.approx(20.0)
    assert scheduler.plan([view(2)]).wait == pytest.approx(8.0)
    assert scheduler.plan([view(2, growths=1)]).wait == pytest.approx(12.0)


@pytest.mark.parametrize("scheduler", [Sync(1, 1, 4, 4, 1.0), Amusd(1.0, least=4), Pearl(5, 1.0)])
def test_a_drafter_that_dribbles_what_nobody_lacks_gets_no_more_time_than_one_that_works(
    scheduler: Scheduler,
) -> None:
    """Siblings of the only node arrive just before patience ends; the tree gets no deeper."""
    waited = 0.0
    for growths in range(1, 100):
        wait = scheduler.plan([view(1, waited=waited, hit=True, growths=growths)]).wait
        waited += wait
        scheduler.on_growth(wait, False, 1)
    assert (
        16.0 <= waited <= 30.0
    )  # four times four growths or five, at what has become their usual delay


def test_rests_of_the_drafter_hardly_count_as_delays() -> None:
    """After a hit, the span between growths includes the target's step, here every second one."""
    scheduler = Sync(2, 2, 2, 5, 1.0)
    for _ in range(200):
        scheduler.on_growth(1.0, False, 1)
        scheduler.on_growth(31.0, False, 1)
    assert scheduler.plan([view(2, growths=1)]).wait < 10.0


@pytest.mark.parametrize(
    ("step", "t", "tokens"),
    [(8.0, 2.0, 4), (9.4, 2.0, 5), (7.2, 2.0, 4), (1.0, 2.0, 1), (1.0, 9.0, 1), (900.0, 1.0, 32)],
)
def test_the_length_of_a_round_of_pearl(step: float, t: float, tokens: int) -> None:
    assert gamma(step, t) == tokens
