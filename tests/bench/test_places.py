"""What the runs of a benchmark cost where they ran, from what they recorded."""

import pytest

from bench.core.forecasts import measured_pair
from bench.core.places import costs_in_place, scaled_step_times
from bench.core.recording_stats import recorded_passes
from bench.core.results import Acceptance, Passes, Profile
from runtime.telemetry.tracing import (
    BOOKKEEPING,
    COMPUTE,
    GROWTH,
    PREFILL,
    STEP,
    TARGET,
    WAIT,
    Trace,
)
from tests.support.benchmarks import run, synthetic

PROFILE = Profile(target={1: 0.020, 8: 0.024, 64: 0.100}, draft={1: 0.001, 4: 0.002}, text=0.001)
PLAIN = Passes(target=((1, 1, 0.022),) * 20, bookkeeping=0.010, messages=0)
DRAFTED = Passes(
    target=((8, 1, 0.036),) * 20,
    bookkeeping=0.040,
    messages=50,
    drafting=((1, 0.002), (4, 0.004), (4, 0.006)),
    round_trip=0.003,
)


def test_passes_are_read_from_recordings() -> None:
    target, drafter = Trace(TARGET, offset=0.0), Trace("draft-0", offset=0.0)
    target.span(TARGET, COMPUTE, 1.0, 1.5, rows=3, sessions=2)
    target.span(TARGET, BOOKKEEPING, 1.5, 1.6)
    target.span(TARGET, PREFILL, 1.7, 1.9)
    target.span(TARGET, WAIT, 1.95, 2.0)
    target.span(TARGET, COMPUTE, 2.05, 2.5, rows=2, sessions=2)
    target.flow(GROWTH, 9, 1.75, TARGET, begins=False)
    target.flow(GROWTH, 10, 1.75, TARGET, begins=True)
    drafter.span("draft-0", STEP, 1.0, 1.1, leaves=4)
    drafter.span("draft-0", STEP, 1.3, 1.4, leaves=2)
    found = recorded_passes(target.drain(), [drafter.drain()])
    assert (found.messages, found.round_trip) == (1, None)
    assert found.target[0] == pytest.approx((3, 2, 0.5))
    assert found.bookkeeping == pytest.approx(
        0.3
    )  # what hands tokens out is not in any span, and takes its time
    assert found.drafting[0] == pytest.approx((4, 0.3))
    assert (len(found.target), len(found.drafting)) == (2, 1)


def test_step_times_are_moved_to_what_passes_took() -> None:
    found = scaled_step_times(PROFILE, [PLAIN, DRAFTED])
    assert found == pytest.approx(
        {1: 0.022, 8: 0.036, 64: 0.150}
    )  # no pass was as wide as that: what is nearest speaks for it


def test_several_texts_and_widths_between_are_held_to_what_they_would_take() -> None:
    seen = Passes(
        target=((9, 5, 2 * (0.024 + 0.076 / 56 + 4 * 0.001)),) * 20, bookkeeping=0.0, messages=0
    )
    assert scaled_step_times(PROFILE, [seen]) == pytest.approx({1: 0.040, 8: 0.048, 64: 0.200})


def test_a_few_odd_passes_move_nothing() -> None:
    odd = Passes(target=((64, 1, 5.0),) * 2, bookkeeping=0.0, messages=0)
    assert scaled_step_times(PROFILE, [PLAIN, odd])[64] == pytest.approx(0.110)
    assert scaled_step_times(PROFILE, [odd])[64] == pytest.approx(
        5.0
    )  # but where there is nothing else
    assert scaled_step_times(PROFILE, []) == PROFILE.target


def test_costs_are_those_of_each_session_growth_and_pass() -> None:
    runs = [
        run("plain", 40.0, passes=PLAIN),
        run("living", 80.0, passes=DRAFTED),
        run("assisted", 40.0),
    ]
    (found,) = costs_in_place(PROFILE, runs)
    assert (found.temperature, found.batch) == (0.0, 1)
    assert found.step == pytest.approx(0.010 / 20)
    assert found.message == pytest.approx((0.040 - 20 * 0.0005) / 50)
    assert found.round_trip == 0.003
    assert found.draft_pass == pytest.approx(0.002)


def test_the_planner_is_given_the_place_of_the_runs() -> None:
    where = costs_in_place(PROFILE, [run("plain", 40.0, passes=PLAIN)])
    profile = PROFILE.model_copy(
        update={"places": where, "acceptance": (Acceptance(temperature=0.0, ranks={1: 0.5}),)}
    )
    found = measured_pair(synthetic().model_copy(update={"profile": profile}), 0.0, 1)
    assert found is not None
    assert (found.target, found.draft, found.text, found.step) == (
        where[0].target,
        PROFILE.draft,
        PROFILE.text,
        where[0].step,
    )


def test_a_drafter_that_is_no_model_has_no_passes_measured_alone() -> None:
    drafted = run("living", 50.0).model_copy(update={"passes": DRAFTED})
    (place,) = costs_in_place(PROFILE.model_copy(update={"draft": {}}), [drafted])
    assert place.draft_pass is None
    assert place.round_trip == pytest.approx(0.003)
