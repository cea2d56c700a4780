"""The commands that show a served fleet compute its figures and print its tables."""

import io
import itertools
import json
import sys
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from actors.cli.commands.compare import comparison_table, pool_guesses
from actors.cli.commands.top import snapshots
from actors.cli.views.status_view import (
    Snapshot,
    drafter_guesses,
    fleet_tokens_per_second,
    render_status,
    status_json,
    sum_guesses,
)
from actors.fleet import client
from actors.fleet.fleet_state import Fleet
from runtime.core.errors import Unavailable
from runtime.telemetry.reports import GuessReport, TargetReport
from tests.support.fleets import FLEET, REPORT, later


def text(found: Any) -> str:
    output = io.StringIO()
    Console(file=output, width=200).print(found)
    return output.getvalue()


def test_speed_counts_the_tokens_between_two_snapshots() -> None:
    assert fleet_tokens_per_second(
        Snapshot(10.0, FLEET), Snapshot(12.0, later(90))
    ) == pytest.approx(45.0)
    assert fleet_tokens_per_second(Snapshot(10.0, FLEET), Snapshot(10.0, FLEET)) == 0.0
    reborn = replace(
        FLEET,
        targets=(
            replace(FLEET.targets[0], incarnation=1, report=TargetReport(completion_tokens=5)),
        ),
    )
    assert fleet_tokens_per_second(Snapshot(10.0, FLEET), Snapshot(12.0, reborn)) == 0.0, (
        "counters of another life"
    )


def test_a_sum_of_drafters_is_weighted_by_their_proposals() -> None:
    found = sum_guesses(REPORT.guesses[name] for name in ("small-0", "small-1"))
    assert (found.proposed, found.accepted, found.acceptance) == (400, 100, 0.25)
    assert (found.round_trip, found.lead) == pytest.approx((0.003, 3.5))
    assert sum_guesses([]).acceptance == 0.0
    assert drafter_guesses(FLEET, "lookup-0").resting
    assert not drafter_guesses(FLEET, "nobody").resting


def test_pools_are_compared_on_what_happened_between_two_snapshots() -> None:
    now = later(
        100,
        small_0=GuessReport(proposed=500, accepted=140, round_trip=0.004, lead=3.0),
        lookup_0=GuessReport(proposed=9, accepted=3),
    )
    found = pool_guesses(FLEET, now, "small")
    assert (found.proposed, found.accepted, found.round_trip) == pytest.approx((200, 50, 0.004))
    anew = pool_guesses(FLEET, now, "lookup")
    assert (anew.proposed, anew.accepted) == (9, 3), "a restarted drafter"
    lines = text(comparison_table({"small": found, "lookup": anew}, now, seconds=10.0)).splitlines()
    assert lines[1].split() == [
        "small",
        "org/small",
        "1",
        "200",
        "50",
        "5.0",
        "25%",
        "4.0",
        "ms",
        "3.0",
    ]


def test_status_shows_targets_drafters_and_pools() -> None:
    said = text(render_status(Snapshot(0.0, FLEET), Snapshot(1.0, later(120))))
    for part in (
        "big",
        "120.0 tokens/s",
        "3 sessions",
        "3 lives lost",
        "1.2.3",
        "http://127.0.0.1:8000/v1",
        "waits for free resources",
        "resting",
    ):
        assert part in said
    target, drafter = (
        next(line.split() for line in said.splitlines() if line.startswith(name))
        for name in ("target-0", "small-0")
    )
    assert target == ["target-0", "ready", "2", "1", "3.70", "25%", "25%", "0"]
    assert drafter == [
        "small-0",
        "small",
        "ready",
        "2",
        "300",
        "90",
        "30%",
        "2.0",
        "ms",
        "4.0",
        "0",
    ]
    assert (
        "pool small: 2 -> 1 drafters (not worth it; gain 1.5 tokens/s, worth 2.5 tokens/s, "
        "of 80.0 tokens/s)" in said
    )


def test_status_shows_heads() -> None:
    with_heads = replace(
        later(0, recycling_0=GuessReport(proposed=80, accepted=20)),
        heads=("recycling-0", "medusa-0"),
    )
    lines = [
        line.split()
        for line in text(
            render_status(Snapshot(0.0, with_heads), Snapshot(1.0, with_heads))
        ).splitlines()
    ]
    assert ["head", "state", "proposed", "accepted", "of", "them"] in lines
    assert ["recycling-0", "ready", "80", "20", "25%"] in lines
    assert ["medusa-0", "ready", "0", "0", "-"] in lines
    found = status_json(Snapshot(0.0, with_heads), Snapshot(1.0, with_heads))["heads"]
    assert [(head["name"], head["guesses"]["accepted"]) for head in found] == [
        ("recycling-0", 20),
        ("medusa-0", 0),
    ]


class Busy:
    """Is a controller that answers every second call."""

    def __init__(self) -> None:
        self.asked = 0

    def fleet(self) -> Fleet:
        self.asked += 1
        if self.asked % 2:
            raise Unavailable("the controller does not answer")
        return FLEET


def test_top_waits_for_a_busy_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["actors.cli.commands.top"], "REFRESH_PERIOD_S", 0.0)
    monkeypatch.setattr(client, "fetch_fleet", Busy().fleet)
    seen = snapshots()
    assert [look.fleet for look in itertools.islice(seen, 3)] == [FLEET] * 3


def test_status_shows_a_fleet_without_pools() -> None:
    assert "target-0" in text(
        render_status(
            Snapshot(0.0, replace(FLEET, pools=(), drafters=())),
            Snapshot(1.0, replace(FLEET, pools=(), drafters=())),
        )
    )


def test_status_as_json() -> None:
    found = json.loads(json.dumps(status_json(Snapshot(0.0, FLEET), Snapshot(1.0, later(120)))))
    assert (found["tokens_per_second"], found["sessions"], found["version"]) == (120.0, 3, "1.2.3")
    assert [drafter["guesses"]["accepted"] for drafter in found["drafters"]] == [50, 90, 10]
    assert found["targets"][0]["report"]["completion_tokens"] == 370
    assert found["pools"][0]["decision"]["why"] == "not worth it"
