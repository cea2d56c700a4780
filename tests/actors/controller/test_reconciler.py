"""What a controller decides, whatever its members do. No Ray."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from actors.controller import fleet_view
from actors.controller.reconciler import (
    GATEWAY,
    MAX_FAILURES,
    MIN_UPTIME_S,
    SCHEDULING_TIMEOUT_S,
    TARGET,
    Action,
    Drain,
    End,
    GiveUp,
    Member,
    Replace,
    Start,
    backoff,
    first_counts,
    mark_lost,
    reconcile,
    reset_failures,
    spec_of,
    timed_out,
)
from actors.fleet.fleet_state import State
from actors.rpc.endpoints import ActorLocation
from runtime.config import Deployment
from tests.support.members import COUNTS, NOW, OTHER, PLAN, member

ALL = (
    member(TARGET, 0),
    member(TARGET, 1),
    member("small", 0),
    member("small", 1),
    member("lookup", 0),
)


def kinds(actions: list[Action]) -> list[tuple[str, str]]:
    return [
        (
            type(action).__name__,
            f"{action.role}-{action.index}" if isinstance(action, Start) else action.name,
        )
        for action in actions
    ]


def decided(
    *members: Member,
    plan: Deployment = PLAN,
    counts: dict[str, int] | None = None,
    gateways: bool = False,
) -> list[tuple[str, str]]:
    return kinds(
        reconcile(plan, first_counts(plan, gateways) if counts is None else counts, members, NOW)
    )


def test_at_first_everything_is_started() -> None:
    assert decided() == [
        ("Start", name) for name in ("target-0", "target-1", "small-0", "small-1", "lookup-0")
    ]
    start = reconcile(PLAN, COUNTS, (), NOW)[2]
    assert start == Start("small", 0, spec_of(PLAN, "small", 0))  # type: ignore[arg-type]


def test_when_all_is_there_nothing_is_done() -> None:
    assert decided(*ALL) == []
    assert decided(*(replace(one, state="starting", place=None, placed=False) for one in ALL)) == []


def test_scaling_up_takes_the_first_free_numbers() -> None:
    there = (member("small", 1), member("small", 3, "draining"))
    assert decided(*there, counts={"small": 4}) == [
        ("Start", "small-0"),
        ("Start", "small-2"),
        ("Start", "small-4"),
    ]


def test_scaling_down_drains_who_has_least_to_do_and_ends_at_once_who_is_not_ready() -> None:
    busy, quiet, idle = (
        member("small", index, sessions=sessions) for index, sessions in enumerate((5, 3, 0))
    )
    assert decided(busy, quiet, idle, counts={"small": 2}) == [("Drain", "small-2")]
    assert decided(busy, quiet, idle, counts={"small": 0}) == [
        ("Drain", "small-0"),
        ("Drain", "small-1"),
        ("Drain", "small-2"),
    ]
    assert decided(member("small", 0, "starting"), idle, counts={"small": 1}) == [
        ("End", "small-0")
    ]
    assert decided(member("small", 0, lost="no answer"), idle, counts={"small": 1}) == [
        ("End", "small-0")
    ]


def test_who_is_being_drained_is_left_alone_until_it_is_done() -> None:
    leaving = member("small", 0, "draining")
    assert decided(leaving, counts={"small": 0}) == []
    assert decided(replace(leaving, drained=True), counts={"small": 0}) == [("End", "small-0")]
    assert decided(replace(leaving, lost="no answer"), counts={"small": 0}) == [("End", "small-0")]
    assert decided(leaving, counts={"small": 1}) == [("Start", "small-1")], "it does not come back"


def test_who_is_lost_is_replaced_at_once_and_who_does_not_start_more_and_more_rarely() -> None:
    assert decided(member("small", 0, lost="no answer", since=NOW), counts={"small": 1}) == [
        ("Replace", "small-0")
    ]
    failing = member("small", 0, "starting", lost="it does not start", since=NOW, failures=2)
    assert decided(failing, counts={"small": 1}) == []
    assert decided(replace(failing, since=NOW - backoff(2)), counts={"small": 1}) == [
        ("Replace", "small-0")
    ]
    assert [backoff(failures) for failures in (0, 1, 2, 3, 20)] == [0, 1, 2, 4, 30]


def test_a_drafter_that_fails_soon_after_each_start_waits_longer_each_time_and_is_given_up() -> (
    None
):
    one, now, failures = member("small", 0, since=NOW), NOW, []
    while one.state != "failed":
        one = mark_lost(replace(one, since=now), "its thread has ended", now + MIN_UPTIME_S / 2)
        failures.append(one.failures)
        now = one.since + backoff(one.failures)
        match reconcile(PLAN, {"small": 1}, (one,), now):
            case [Replace(name)] if name == one.name:
                assert reconcile(PLAN, {"small": 1}, (one,), now - 0.01) == []
                one = replace(one, lost="", state="ready")
            case [GiveUp(name)] if name == one.name:
                one = replace(one, state="failed")
    assert failures == list(range(1, MAX_FAILURES + 1))
    assert decided(one, counts={"small": 1}) == [], "and nobody is started in its place"
    assert decided(one, counts={"small": 2}) == [("Start", "small-1")]
    assert decided(one, counts={"small": 0}) == [("End", "small-0")]
    assert reconcile(PLAN, {"small": 1}, (reset_failures(one),), now) == [Replace("small-0")]
    (shown,) = fleet_view.build_fleet(
        PLAN, {"small": 1, "lookup": 0}, [one], {}, {}, 0, now
    ).drafters
    assert (shown.state, shown.restarts) == ("failed", 0)
    assert shown.trouble == (
        "given up after 10 failures in a row, the last: its thread has ended; "
        "`outrider scale small=N` tries again"
    )


def test_who_has_lived_long_enough_begins_anew_and_a_target_never_waits_for_a_short_life() -> None:
    assert (
        mark_lost(member("small", 0, since=NOW, failures=9), "killed", NOW + MIN_UPTIME_S).failures
        == 0
    )
    assert (
        mark_lost(
            member("small", 0, "starting", since=NOW, failures=2), "no such file", NOW + 60
        ).failures
        == 3
    )
    assert (
        mark_lost(
            member(TARGET, 0, since=NOW, failures=9), "killed", NOW + MIN_UPTIME_S / 2
        ).failures
        == 0
    )
    stubborn = member(TARGET, 0, "starting", lost="it does not start", since=NOW - 30, failures=99)
    assert decided(stubborn, counts={TARGET: 1}) == [("Replace", "target-0")]


def test_who_is_on_a_node_that_leaves_is_drained_and_followed_elsewhere() -> None:
    going = replace(ALL[0], leaves=True)
    assert decided(going, *ALL[1:]) == [("Drain", "target-0"), ("Start", "target-2")], (
        "another target takes the new sessions"
    )
    only = (replace(going, leaves=True), replace(ALL[1], leaves=True))
    assert decided(*only, counts={TARGET: 2}) == [("Start", "target-2"), ("Start", "target-3")], (
        "nobody else would take them"
    )
    follower = member(TARGET, 2)
    assert decided(*only, follower, counts={TARGET: 2}) == [
        ("Drain", "target-0"),
        ("Drain", "target-1"),
        ("Start", "target-3"),
    ]
    assert decided(replace(ALL[2], leaves=True), counts={"small": 1}) == [
        ("Drain", "small-0"),
        ("Start", "small-1"),
    ]
    assert decided(replace(going, lost="killed"), ALL[1])[:1] == [("End", "target-0")]


def test_silence_counts_from_when_others_are_heard() -> None:
    assert not timed_out(asked=10.0, last_heard=10.5, now=11.9)
    assert timed_out(asked=10.0, last_heard=10.5, now=12.1)
    assert not timed_out(asked=10.0, last_heard=10.0, now=12.1), (
        "nobody has answered since: is it the controller that hears nothing?"
    )
    assert timed_out(asked=10.0, last_heard=10.0, now=16.1)
    assert not timed_out(asked=10.0, last_heard=10.5, now=24.9, timeout_s=15.0)
    assert timed_out(asked=10.0, last_heard=10.5, now=25.1, timeout_s=15.0)


def test_a_lost_target_is_replaced_though_others_are_there() -> None:
    assert decided(replace(ALL[0], lost="no answer"), *ALL[1:]) == [("Replace", "target-0")]


def test_what_changes_is_started_before_what_was_is_drained() -> None:
    old = (member("small", 0), member("small", 1))
    assert decided(*old, plan=OTHER, counts={"small": 2}) == [
        ("Start", "small-2"),
        ("Start", "small-3"),
    ]
    coming = (member("small", 2, "starting", OTHER), member("small", 3, "starting", OTHER))
    assert decided(*old, *coming, plan=OTHER, counts={"small": 2}) == []
    one = (member("small", 2, plan=OTHER), coming[1])
    assert decided(*old, *one, plan=OTHER, counts={"small": 2}) == [("Drain", "small-1")]
    both = (one[0], member("small", 3, plan=OTHER))
    gone = replace(old[1], state="draining", drained=True)
    assert decided(old[0], gone, *both, plan=OTHER, counts={"small": 2}) == [
        ("End", "small-1"),
        ("Drain", "small-0"),
    ]


def test_what_is_outdated_makes_room_where_the_cluster_has_none() -> None:
    old = (member("small", 0), member("small", 1))
    waiting = member(
        "small", 2, "starting", OTHER, since=NOW - SCHEDULING_TIMEOUT_S, unschedulable=True
    )
    assert decided(
        *old, waiting, member("small", 3, "starting", OTHER), plan=OTHER, counts={"small": 2}
    ) == [("Drain", "small-1")]
    slow = replace(waiting, unschedulable=False)
    assert (
        decided(*old, slow, member("small", 3, "starting", OTHER), plan=OTHER, counts={"small": 2})
        == []
    ), "its process starts slowly"
    loading = replace(waiting, placed=True)
    assert (
        decided(
            *old, loading, member("small", 3, "starting", OTHER), plan=OTHER, counts={"small": 2}
        )
        == []
    )


def test_a_pool_that_is_gone_is_drained_and_what_is_unchanged_stays() -> None:
    assert decided(*ALL, plan=OTHER) == [
        ("Start", "small-2"),
        ("Start", "small-3"),
        ("Drain", "lookup-0"),
    ]


def test_drafters_of_another_target_are_other_drafters() -> None:
    bigger = PLAN.model_copy(update={"target": PLAN.target.model_copy(update={"model": "bigger"})})
    assert [name for kind, name in decided(*ALL, plan=bigger) if kind == "Start"] == [
        "target-2",
        "target-3",
        "small-2",
        "small-3",
        "lookup-1",
    ]
    more = PLAN.model_copy(update={"target": PLAN.target.model_copy(update={"replicas": 3})})
    assert decided(*ALL, plan=more) == [("Start", "target-2")], (
        "more replicas change none of those that are there"
    )


def test_gateways_are_one_for_each_node_and_change_in_place() -> None:
    plan = Deployment.model_validate(
        {"target": {"model": "big"}, "gateway": {"nodes": ["10.0.0.1", "10.0.0.2"]}}
    )
    assert decided(plan=plan, gateways=True)[1:] == [("Start", "gateway-0"), ("Start", "gateway-1")]
    there = (
        member(TARGET, 0, plan=plan),
        member(GATEWAY, 0, plan=plan),
        member(GATEWAY, 1, plan=plan),
    )
    bigger = plan.model_copy(update={"target": plan.target.model_copy(update={"model": "bigger"})})
    assert decided(*there, plan=bigger, gateways=True) == [("Start", "target-1")], (
        "they serve the targets of before meanwhile"
    )
    led = member(TARGET, 1, plan=bigger)
    changing = [("Drain", "target-0"), ("Drain", "gateway-0"), ("Drain", "gateway-1")]
    assert decided(*there, led, plan=bigger, gateways=True) == changing
    moved = Deployment.model_validate(
        {"target": {"model": "big"}, "gateway": {"nodes": ["10.0.0.1", "10.0.0.3"]}}
    )
    assert decided(*there, plan=moved, gateways=True) == [("Drain", "gateway-1")], (
        "its port is not free while it is there"
    )
    assert decided(*there[:2], plan=moved, gateways=True) == [("Start", "gateway-1")]
    assert spec_of(plan, GATEWAY, 2) is None
    assert first_counts(PLAN, gateways=True)[GATEWAY] == 1


STATES: tuple[State, ...] = ("starting", "ready", "draining")


@st.composite
def members(draw: st.DrawFn) -> list[Member]:
    found = []
    for index in draw(st.lists(st.integers(0, 6), unique=True, max_size=6)):
        plan, state = draw(st.sampled_from([PLAN, OTHER])), draw(st.sampled_from(STATES))
        lost = draw(st.sampled_from(["", "", "no answer"]))
        found.append(
            member("small", index, state, plan, lost=lost, sessions=draw(st.integers(0, 3)))
        )
    return found


def arrived(one: Member) -> Member:
    """What was under way is done."""
    match one.state:
        case "starting":
            return one if one.lost else replace(one, state="ready")
        case "draining":
            return replace(one, drained=True)
        case "ready" | "failed":
            return one


@given(members(), st.integers(0, 5))
def test_whatever_the_beginning_it_ends_with_as_many_as_are_wanted_and_never_fewer_serve_than_could(
    there: list[Member], count: int
) -> None:
    """A cluster that does at once what is decided."""
    now = {one.name: one for one in there}
    could = min(count, sum(one.state == "ready" and not one.lost for one in there))
    for _ in range(20):
        serving = sum(one.state == "ready" and not one.lost for one in now.values())
        assert serving >= could
        actions = reconcile(PLAN, {"small": count}, tuple(now.values()), NOW)
        for action in actions:
            match action:
                case Start(role, index, spec):
                    assert f"{role}-{index}" not in now
                    now[f"{role}-{index}"] = Member(
                        f"{role}-{index}",
                        role,
                        index,
                        0,
                        spec,
                        "ready",
                        NOW,
                        ActorLocation("", 1, "node"),
                    )
                case Replace(name):
                    now[name] = replace(now[name], lost="", state="ready")
                case GiveUp(name):
                    now[name] = replace(now[name], state="failed")
                case Drain(name):
                    now[name] = replace(now[name], state="draining", drained=True)
                case End(name):
                    del now[name]
        now = {name: arrived(one) for name, one in now.items()}
    assert actions == []
    assert (
        sorted(one.spec == spec_of(PLAN, "small", one.index) for one in now.values())
        == [True] * count
    )
