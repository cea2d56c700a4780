"""The controller reports and saves its members, and counts them for pool sizes. No Ray."""

from dataclasses import replace

import pytest

from actors.controller import autoscaler, controller_state, fleet_view
from actors.controller.controller_state import ControllerState
from actors.controller.reconciler import GATEWAY, SCHEDULING_TIMEOUT_S, TARGET, Member
from actors.fleet.fleet_state import Fleet
from actors.fleet.scaling_policy import Decision
from actors.rpc.endpoints import ActorLocation
from runtime.config import Deployment, TlsConfig
from runtime.telemetry.reports import DrafterReport, GuessReport, TargetReport
from tests.support.members import COUNTS, NOW, PLAN, member


def test_what_was_written_down_is_read_again() -> None:
    tls = TlsConfig.model_validate({"ca": "/a.pem", "cert": "/c.pem", "key": "/k.pem"})
    plan = Deployment.model_validate({**PLAN.model_dump(), "security": {"tls": tls}})
    there = [
        member(role, index, plan=plan, restarts=3)
        for role, index in ((TARGET, 1), ("small", 1), (GATEWAY, 0))
    ]
    written = ControllerState(
        plan,
        {"small": 1},
        (*there, member("small", 0, "starting", lost="no answer")),
        {"small-1": 4},
        9,
    )
    assert controller_state.decode(controller_state.encode(written)) == written


def told(*found: Member, **reports: TargetReport | DrafterReport) -> Fleet:
    named = {name.replace("_", "-"): report for name, report in reports.items()}
    decision = Decision("small", 5.0, 1, 2, "to see what one more brings", None, None, 80.0)
    return fleet_view.build_fleet(PLAN, COUNTS, found, named, {"small": decision}, 4, NOW)


def test_what_is_told_of_a_fleet() -> None:
    target, drafter = TargetReport(live=2, waiting=1), DrafterReport(sessions=2)
    lost = member("small", 1, lost="no answer for 2.1 s", restarts=1)
    waiting = member("lookup", 0, "starting", since=NOW - SCHEDULING_TIMEOUT_S, unschedulable=True)
    found = told(
        waiting,
        lost,
        member("small", 0),
        member(TARGET, 0, sessions=3),
        target_0=target,
        small_0=drafter,
    )
    assert (found.model, found.served_model, found.replaced) == ("big", "big", 4)
    assert [
        (one.name, one.state, one.sessions, one.address, one.node) for one in found.targets
    ] == [("target-0", "ready", 3, "10.0.0.1:0", "node")]
    assert found.targets[0].report is target
    assert found.targets[0].model == "big"
    assert [(one.name, one.pool, one.state, one.trouble) for one in found.drafters] == [
        ("lookup-0", "lookup", "starting", "waits for free resources in the cluster"),
        ("small-0", "small", "ready", ""),
        ("small-1", "small", "starting", "no answer for 2.1 s"),
    ]
    assert found.drafters[1].report is drafter
    assert [(pool.name, pool.draft, pool.count, pool.ready) for pool in found.pools] == [
        ("small", "s", 2, 1),
        ("lookup", "ngram", 1, 0),
    ]
    assert (
        str(found.pools[0].decision)
        == "pool small: 1 -> 2 drafters (to see what one more brings; of 80.0 tokens/s)"
    )
    assert found.gateways == ()


def test_only_gateways_that_serve_are_named() -> None:
    there = [replace(member(GATEWAY, 0), place=ActorLocation("http://127.0.0.1:8000", 7, "node"))]
    assert told(*there).gateways == ("http://127.0.0.1:8000",)
    assert told(replace(there[0], state="draining")).gateways == ()


def test_counters_of_all_targets_make_a_sample() -> None:
    one = TargetReport(
        steps=10,
        rounds=20,
        accepted=30,
        computed=1.0,
        waited=2.0,
        bookkeeping=3.0,
        guesses={"small-0": GuessReport(accepted=9)},
    )
    two = TargetReport(
        steps=1,
        rounds=2,
        accepted=3,
        guesses={"small-0": GuessReport(accepted=1), "lookup-0": GuessReport(accepted=2)},
    )
    there = (
        member(TARGET, 0),
        member(TARGET, 1),
        member("small", 0),
        member("small", 1, "starting"),
    )
    found = autoscaler.take_sample("small", there, {"target-0": one, "target-1": two}, NOW)
    assert (found.at, found.ready, found.steps, found.rounds, found.accepted, found.own) == (
        NOW,
        1,
        11,
        22,
        33,
        10,
    )
    assert found.busy == pytest.approx(6.0)
