"""What any scheduler owes the engine, for any view; and the naive twin exactly."""

import math
import pkgutil
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime.schedulers
from runtime.messages import Round
from runtime.schedulers.base import Plan, Scheduler, View
from runtime.schedulers.fixed import Fixed
from runtime.schedulers.living import ROWS, Living

PATIENCE = 0.02

MAKERS: dict[str, Callable[[], Scheduler]] = {  # by file
    "fixed": lambda: Fixed(8, PATIENCE),
    "living": lambda: Living({rows: 0.01 + 0.0005 * rows for rows in ROWS}),
}


def test_every_file_is_under_contract() -> None:
    assert MAKERS.keys() == {module.name for module in pkgutil.iter_modules(runtime.schedulers.__path__)} - {"base"}


SECONDS = st.floats(1e-5, 0.5)
ROUNDS = st.builds(
    lambda width, accepted, hit, waited, computed, other: Round("s", 0, width, min(accepted, width), hit, waited, computed, other),
    st.integers(0, 80),
    st.integers(0, 80),
    st.booleans(),
    st.floats(0.0, 0.5),
    SECONDS,
    st.floats(0.0, 0.1),
)
HISTORIES = st.lists(st.one_of(ROUNDS, st.tuples(SECONDS, st.booleans())), max_size=40)
GAINS = st.lists(st.floats(0.0, 1.0), max_size=80).map(lambda gains: sorted(gains, reverse=True))
SCHEDULERS = pytest.mark.parametrize("make", list(MAKERS.values()), ids=list(MAKERS))


def taught(make: Callable[[], Scheduler], history: list[Round | tuple[float, bool]]) -> Scheduler:
    scheduler = make()
    for seen in history:
        if isinstance(seen, Round):
            scheduler.observe(seen)
        else:
            scheduler.grew(*seen)
    return scheduler


def check(plan: Plan, view: View) -> None:
    assert isinstance(plan.rows, int)
    assert 0 <= plan.rows <= len(view.gains)
    assert 0.0 <= plan.wait < math.inf


@SCHEDULERS
@settings(max_examples=50)
@given(
    history=HISTORIES, gains=GAINS, drafters=st.integers(0, 4), hit=st.booleans(), waited=st.floats(0.0, 2.0), before=st.floats(0.0, 2.0)
)
def test_a_plan_is_sane_for_any_view(
    make: Callable[[], Scheduler],
    history: list[Round | tuple[float, bool]],
    gains: list[float],
    drafters: int,
    hit: bool,
    waited: float,
    before: float,
) -> None:
    view = View(gains, drafters, hit, waited, before + waited)
    plan = taught(make, history).plan(view)
    check(plan, view)
    if drafters == 0:
        assert plan.wait == 0.0


@SCHEDULERS
@settings(max_examples=50)
@given(history=HISTORIES, gains=GAINS, hit=st.booleans(), before=st.floats(0.0, 0.5))
def test_patience_with_a_silent_drafter_ends(
    make: Callable[[], Scheduler], history: list[Round | tuple[float, bool]], gains: list[float], hit: bool, before: float
) -> None:
    """Asked again after each wait, it steps before long: at most some multiple of the slowest growth or step ever seen."""
    scheduler, waited = taught(make, history), 0.0
    slowest = max([PATIENCE, *(seen[0] if isinstance(seen, tuple) else seen.computed for seen in history)])
    for _ in range(50):
        view = View(gains, 1, hit, waited, before + waited)
        plan = scheduler.plan(view)
        check(plan, view)
        if plan.wait == 0.0:
            return
        waited += plan.wait
        assert waited <= 4 * slowest
    pytest.fail("it has waited fifty times")


@SCHEDULERS
@settings(max_examples=50)
@given(history=HISTORIES, gains=GAINS, hit=st.booleans(), since=st.floats(0.0, 1.0))
def test_a_plan_is_a_pure_function_of_what_was_seen(
    make: Callable[[], Scheduler], history: list[Round | tuple[float, bool]], gains: list[float], hit: bool, since: float
) -> None:
    view = View(gains, 1, hit, 0.0, since)
    scheduler = taught(make, history)
    assert scheduler.plan(view) == scheduler.plan(view) == taught(make, history).plan(view)


@pytest.mark.parametrize(
    ("view", "plan"),
    [
        (View([], 0, False, 0.0, 0.0), Plan(0)),
        (View([], 1, False, 0.0, 0.3), Plan(0, PATIENCE)),
        (View([], 1, True, 0.015, 0.3), Plan(0, PATIENCE - 0.015)),
        (View([], 1, False, PATIENCE, 0.3), Plan(0)),
        (View([0.9], 1, False, 0.0, 0.0), Plan(1)),
        (View([0.9] * 9, 0, False, 0.0, 0.0), Plan(8)),
    ],
)
def test_fixed(view: View, plan: Plan) -> None:
    scheduler = Fixed(8, PATIENCE)
    scheduler.observe(Round("s", 0, 8, 0, False, 0.0, 9.0, 0.0))
    scheduler.grew(9.0, True)
    assert scheduler.plan(view) == plan
