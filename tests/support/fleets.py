"""Builds the report of a served fleet."""

from dataclasses import replace

from actors.fleet.fleet_state import DrafterState, Fleet, PoolState, TargetState
from actors.fleet.scaling_policy import Decision
from runtime.telemetry.reports import DrafterReport, GuessReport, TargetReport

REPORT = TargetReport(
    live=2,
    waiting=1,
    kv_used=50,
    kv_slots=200,
    rounds=100,
    completion_tokens=250,
    verified=600,
    accepted=150,
    guesses={
        "small-0": GuessReport(proposed=300, accepted=90, round_trip=0.002, lead=4.0),
        "small-1": GuessReport(proposed=100, accepted=10, round_trip=0.006, lead=2.0),
        "lookup-0": GuessReport(proposed=50, accepted=50, resting=True),
    },
)
FLEET = Fleet(
    model="/models/big",
    served_model="big",
    version="1.2.3",
    targets=(
        TargetState("target-0", "10.0.0.1:1", 0, "ready", 3, REPORT, "node"),
        TargetState(
            "target-1", "", 2, "starting", 0, None, "", 2, "waits for free resources in the cluster"
        ),
    ),
    drafters=(
        DrafterState("lookup-0", "lookup", "10.0.0.1:2", 0, "ready", 0, DrafterReport(), "node"),
        DrafterState(
            "small-0", "small", "10.0.0.1:3", 0, "ready", 0, DrafterReport(sessions=2), "node"
        ),
        DrafterState(
            "small-1", "small", "10.0.0.1:4", 1, "draining", 1, DrafterReport(sessions=1), "node"
        ),
    ),
    pools=(
        PoolState(
            "small",
            "org/small",
            1,
            1,
            0,
            4,
            True,
            Decision("small", 3.0, 2, 1, "not worth it", 1.5, 2.5, 80.0),
        ),
        PoolState("lookup", "ngram", 1, 1, 0, 64, False),
    ),
    gateways=("http://127.0.0.1:8000",),
    replaced=3,
)


def later(tokens: int, **guesses: GuessReport) -> Fleet:
    """Returns FLEET after its target has delivered `tokens` more, with these guesses changed."""
    named = {name.replace("_", "-"): report for name, report in guesses.items()}
    report = replace(
        REPORT, completion_tokens=REPORT.completion_tokens + tokens, guesses=REPORT.guesses | named
    )
    return replace(FLEET, targets=(replace(FLEET.targets[0], report=report), FLEET.targets[1]))
