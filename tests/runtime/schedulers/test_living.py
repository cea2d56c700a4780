"""The living schedule: rows go where they pay, patience ends where it does not."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.core.messages import Round
from runtime.schedulers.base import SessionView
from runtime.schedulers.living import LATE_FACTOR, MAX_STEP_NODES, Living

TIMES = {1: 0.010, 2: 0.010, 4: 0.011, 8: 0.012, 16: 0.014, 17: 0.018, 32: 0.020}


def view(gains: list[float], **options: object) -> SessionView:
    falling = np.sort(np.asarray(gains))[::-1]
    return SessionView(gains=falling, leaves=falling if gains else np.ones(1), **options)  # type: ignore[arg-type]


def living(rate: float = 100.0, first: float | None = 0.002, gap: float | None = 0.001) -> Living:
    found = Living(TIMES)
    found.tokens, found.seconds = rate, 1.0
    found.delay = {True: first, False: gap}
    return found


def test_time_is_linear_between_and_beyond_what_was_measured() -> None:
    found = living()
    assert found.pass_seconds([1, 6, 16, 17, 24, 47]).tolist() == pytest.approx(
        [0.010, 0.0115, 0.014, 0.018, 0.018 + 7 * 0.002 / 15, 0.022]
    )
    assert Living({1: 0.01}).pass_seconds([1, 64]).tolist() == [0.01, 0.01]


@settings(max_examples=200)
@given(
    st.lists(st.lists(st.floats(0.0, 1.0), max_size=12), min_size=1, max_size=4),
    st.floats(10.0, 2000.0),
)
def test_rows_are_the_best_that_any_choice_of_rows_could_be(
    trees: list[list[float]], rate: float
) -> None:
    """Compares with every choice of the best n per session; a rate below plain is ignored."""
    found, views = living(rate), [view(tree) for tree in trees]
    rate = max(rate, len(views) / float(found.pass_seconds(len(views))))

    def value(rows: tuple[int, ...]) -> float:
        expected = sum(
            float(one.gains[:count].sum()) for one, count in zip(views, rows, strict=True)
        )
        return expected - rate * float(found.pass_seconds(len(views) + sum(rows)))

    best = max(
        value(rows) for rows in itertools.product(*(range(len(one.gains) + 1) for one in views))
    )
    assert value(found.plan(views).rows) == pytest.approx(best)


def test_rows_go_to_the_best_nodes_across_sessions() -> None:
    assert living(300.0).plan([view([0.9, 0.8]), view([]), view([0.7, 0.01])]).rows == (2, 0, 1)
    # At this rate the fourth row costs 0.0005 * 800 = 0.4 tokens, those up to the eighth 0.2 each.
    assert living(800.0).plan([view([0.9, 0.3]), view([]), view([0.15, 0.01])]).rows == (2, 0, 0)


def test_the_seventeenth_row_must_pay_for_its_tile() -> None:
    assert living(100.0).plan([view([0.3] * 16)]).rows == (15,)  # 0.3 < 100 * 0.004
    assert living(100.0).plan([view([0.3] * 20)]).rows == (20,)  # five of them pay for it
    assert living(100.0).plan([view([0.41] * 16)]).rows == (16,)


def test_no_more_rows_than_a_pass_may_have() -> None:
    assert living(0.001).plan([view([0.9] * 200), view([0.8] * 200)]).rows == (MAX_STEP_NODES, 0)


@pytest.mark.parametrize(
    ("options", "waits"),
    [
        ({}, True),  # 0.9 tokens are promised in 2 ms, in which 0.2 are earned
        ({"coverage": 0.41}, True),
        ({"coverage": 0.39}, False),  # less than twice as many
        ({"drafters": 0}, False),
        ({"coverage": 0.1}, False),
        ({"since_growth": 0.002 * LATE_FACTOR}, False),  # late
        ({"since_growth": 0.002 * LATE_FACTOR - 0.0001}, True),
    ],
)
def test_after_a_miss_it_waits_for_what_is_worth_it(options: dict[str, float], waits: bool) -> None:
    plan = living().plan([view([], **{"drafters": 1, "coverage": 0.9, **options})])
    assert (plan.wait > 0.0) == waits
    assert plan.wait <= 0.002 * LATE_FACTOR


def test_it_waits_for_more_as_long_as_the_leaves_promise_twice_what_the_target_earns() -> None:
    found, seen = living(300.0), {"drafters": 1, "coverage": 0.9, "growths": 1}
    found.width = 2.0
    assert (
        found.plan([view([0.5, 0.2, 0.2], **seen)]).wait > 0.0
    )  # 0.9 * 0.7 > 2 * 0.3; a pass takes two leaves
    assert found.plan([view([0.5, 0.1, 0.1], **seen)]).wait == 0.0
    assert (
        found.plan([view([0.5, 0.1, 0.1], **{**seen, "since_growth": 0.0005})]).wait > 0.0
    )  # it is half way here
    assert (
        found.plan([view([0.2, 0.1, 0.1], **{**seen, "since_growth": 0.0015})]).wait == 0.0
    )  # late, and not worth more patience


def test_with_other_sessions_nobody_is_waited_for() -> None:
    assert living().plan([view([], drafters=1, coverage=0.9), view([])]).wait == 0.0


def test_before_growth_was_ever_seen_it_tries_for_half_a_step() -> None:
    found = living(first=None, gap=None)
    assert found.plan([view([], drafters=1, coverage=0.9)]).wait == pytest.approx(0.005)
    assert found.plan([view([], drafters=1, coverage=0.9, since_growth=0.005)]).wait == 0.0


def done(
    width: int = 0,
    accepted: int = 0,
    computed: float = 0.01,
    waited: float = 0.0,
    other: float = 0.0,
) -> Round:
    return Round("s", 0, width, accepted, accepted == width, waited, computed, other)


def test_the_rate_is_that_of_many_steps_of_all_sessions() -> None:
    found = Living(TIMES)
    assert found.rate == pytest.approx(100.0)
    for n in range(400):
        found.observe([done(3, n % 4), done(2, 1)] if n % 2 else [done(2, 0, 0.02, 0.005, 0.005)])
    assert found.rate == pytest.approx((5 + 1) / 2 / 0.02, rel=0.1)


def test_step_times_follow_what_is_seen_and_stay_monotone() -> None:
    found = Living(TIMES)
    for _ in range(300):
        found.observe([done(5, computed=0.030), done(5, computed=0.030)])
        assert (np.diff(found.times) >= 0.0).all()
    assert float(found.pass_seconds(12)) == pytest.approx(0.030, rel=0.02)
    assert float(found.pass_seconds(1)) == pytest.approx(0.010, rel=0.1)
    assert float(found.pass_seconds(32)) >= 0.030


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
def test_a_step_that_the_machine_held_up_does_not_end_speculation(rows: int) -> None:
    """One second at this width, then normal steps: the number of rows soon recovers."""
    found, tree = Living(TIMES), [view([0.9**n for n in range(1, 12)])]

    def steps(count: int) -> list[int]:
        chosen = []
        for _ in range(count):
            (width,) = found.plan(tree).rows
            found.observe([done(width, 2, computed=float(Living(TIMES).pass_seconds(1 + width)))])
            chosen.append(width)
        return chosen

    before = steps(100)[-1]
    assert before >= 7
    found.observe([done(rows - 1, 0, computed=1.0)])
    assert set(steps(100)[50:]) == {before}


def test_what_pseudo_rows_take_is_not_the_price_of_verified_rows() -> None:
    found = Living(TIMES)
    for _ in range(100):
        found.observe([replace(done(3, computed=TIMES[4] + 0.020), ridden=0.020)])
    assert found.times.tolist() == pytest.approx([TIMES[rows] for rows in sorted(TIMES)])
    assert found.rate == pytest.approx(1.0 / (TIMES[4] + 0.020), rel=0.05), (
        "the time is gone all the same"
    )


def test_a_width_that_was_slow_for_a_while_is_tried_again() -> None:
    found = Living(TIMES)
    for _ in range(50):
        found.observe([done(15, computed=0.1)])
    assert float(found.pass_seconds(16)) == pytest.approx(0.1, rel=0.02)
    for _ in range(500):
        found.observe([done(0)])
    assert found.times.tolist() == pytest.approx([TIMES[rows] for rows in sorted(TIMES)], rel=0.05)
    for _ in range(500):  # a faster machine: faster for all widths, as far as is known
        found.observe([done(0, computed=0.005)])
    assert found.times.tolist() == pytest.approx(
        [TIMES[rows] / 2 for rows in sorted(TIMES)], rel=0.05
    )


def test_delays_are_learned_apart() -> None:
    found = Living(TIMES)
    for _ in range(200):
        found.on_growth(0.004, first=True, leaves=8)
        found.on_growth(0.001, first=False, leaves=2)
    assert found.delay == {True: pytest.approx(0.004), False: pytest.approx(0.001)}
    assert found.width == pytest.approx(5.0, abs=0.2)


def test_a_silent_drafter_is_soon_not_waited_for() -> None:
    """An n-gram drafter often has nothing to propose, and says so by silence."""
    found = Living(TIMES)
    empty = view([], drafters=1, coverage=0.7)
    assert found.plan([empty]).wait > 0.0
    silent = Round("s", 0, 0, 0, False, waited=0.01, computed=0.02, bookkeeping=0.0)
    steps = 0
    while found.plan([empty]).wait > 0.0:
        found.observe([silent])
        steps += 1
    assert 0 < steps < 20
    for _ in range(20):
        found.on_growth(0.002, first=True, leaves=4)
        found.observe([replace(silent, waited=0.0)])
    assert found.plan([empty]).wait > 0.0
