"""The commands around a served fleet: their input, their figures and tables, the local Ray that they find. Nothing is started."""

import io
import itertools
import json
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from rich.console import Console

from actors.cli.commands.compare import comparison_table, pool_guesses
from actors.cli.commands.drain import sessions_left
from actors.cli.commands.logs import is_life_of, tail
from actors.cli.commands.scale import is_settled, parse_wish, raise_given_up
from actors.cli.commands.serve import curl_command
from actors.cli.commands.top import snapshots
from actors.cli.views.status_view import (
    Snapshot,
    drafter_guesses,
    fleet_tokens_per_second,
    render_status,
    status_json,
    sum_guesses,
)
from actors.controller import client
from actors.controller.fleet_view import DrafterState, Fleet, PoolState, TargetState
from actors.controller.scaling_policy import Decision
from actors.launch import local_ray
from actors.launch.local_ray import LocalRay
from runtime.config import Deployment, GatewayConfig, cache_folder
from runtime.core.errors import InvalidRequest, Unavailable
from runtime.telemetry.reports import DrafterReport, GuessReport, TargetReport
from tests.actors.cli.test_cli import one_line_about, outrider

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
            "target-1", "", 2, "starting", 0, None, "", 2, "it waits for room in the cluster"
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
    """FLEET when its target has delivered so many more tokens, with other guesses."""
    named = {name.replace("_", "-"): report for name, report in guesses.items()}
    report = replace(
        REPORT, completion_tokens=REPORT.completion_tokens + tokens, guesses=REPORT.guesses | named
    )
    return replace(FLEET, targets=(replace(FLEET.targets[0], report=report), FLEET.targets[1]))


def text(found: Any) -> str:
    output = io.StringIO()
    Console(file=output, width=200).print(found)
    return output.getvalue()


# Figures


def test_speed_is_what_was_delivered_between_two_looks() -> None:
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


def test_what_several_have_brought_is_weighted_by_what_they_proposed() -> None:
    found = sum_guesses(REPORT.guesses[name] for name in ("small-0", "small-1"))
    assert (found.proposed, found.accepted, found.acceptance) == (400, 100, 0.25)
    assert (found.round_trip, found.lead) == pytest.approx((0.003, 3.5))
    assert sum_guesses([]).acceptance == 0.0
    assert drafter_guesses(FLEET, "lookup-0").resting
    assert not drafter_guesses(FLEET, "nobody").resting


def test_two_pools_are_compared_on_what_came_between_two_looks() -> None:
    now = later(
        100,
        small_0=GuessReport(proposed=500, accepted=140, round_trip=0.004, lead=3.0),
        lookup_0=GuessReport(proposed=9, accepted=3),
    )
    found = pool_guesses(FLEET, now, "small")
    assert (found.proposed, found.accepted, found.round_trip) == pytest.approx((200, 50, 0.004))
    anew = pool_guesses(FLEET, now, "lookup")
    assert (anew.proposed, anew.accepted) == (9, 3), "a drafter that has begun anew"
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


def test_the_status_shows_it_all() -> None:
    said = text(render_status(Snapshot(0.0, FLEET), Snapshot(1.0, later(120))))
    for part in (
        "big",
        "120.0 tokens/s",
        "3 sessions",
        "3 lives lost",
        "1.2.3",
        "http://127.0.0.1:8000/v1",
        "waits for room",
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
        "pool small: 2 -> 1 drafters (not worth it; gain 1.5 tokens/s, worth 2.5 tokens/s, of 80.0 tokens/s)"
        in said
    )


def test_heads_are_shown_beside_drafters() -> None:
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
    """A controller that answers every other time."""

    def __init__(self) -> None:
        self.asked = 0

    def fleet(self) -> Fleet:
        self.asked += 1
        if self.asked % 2:
            raise Unavailable("the controller does not answer")
        return FLEET


def test_top_waits_for_a_controller_that_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["actors.cli.commands.top"], "REFRESH_PERIOD_S", 0.0)
    monkeypatch.setattr(client, "fetch_fleet", Busy().fleet)
    seen = snapshots()
    assert [look.fleet for look in itertools.islice(seen, 3)] == [FLEET] * 3


def test_a_fleet_without_pools_is_shown_too() -> None:
    assert "target-0" in text(
        render_status(
            Snapshot(0.0, replace(FLEET, pools=(), drafters=())),
            Snapshot(1.0, replace(FLEET, pools=(), drafters=())),
        )
    )


def test_the_object_of_json() -> None:
    found = json.loads(json.dumps(status_json(Snapshot(0.0, FLEET), Snapshot(1.0, later(120)))))
    assert (found["tokens_per_second"], found["sessions"], found["version"]) == (120.0, 3, "1.2.3")
    assert [drafter["guesses"]["accepted"] for drafter in found["drafters"]] == [50, 90, 10]
    assert found["targets"][0]["report"]["completion_tokens"] == 370
    assert found["pools"][0]["decision"]["why"] == "not worth it"


def test_when_scaling_and_draining_are_over() -> None:
    assert not is_settled(FLEET, "small"), "one is still on its way out"
    assert is_settled(FLEET, "lookup")
    given_up = replace(
        FLEET,
        drafters=(
            replace(FLEET.drafters[1], state="failed", trouble="given up after 10 failures"),
        ),
    )
    raise_given_up(FLEET, "small")
    raise_given_up(given_up, "lookup")
    with pytest.raises(Unavailable, match="small-0 is given up after 10 failures"):
        raise_given_up(given_up, "small")
    assert sessions_left(FLEET, "small-1") == 1
    assert sessions_left(FLEET, "small-0") is None
    assert (
        sessions_left(
            replace(FLEET, targets=(replace(FLEET.targets[0], state="draining"),)), "target-0"
        )
        == 3
    )


@pytest.mark.parametrize(
    ("name", "actor", "is_it"),
    [
        ("target-0-3", "target-0", True),
        ("controller", "controller", True),
        ("target-0-3", "target", False),
        ("target-01-3", "target-0", False),
    ],
)
def test_the_lives_of_an_actor(name: str, actor: str, is_it: bool) -> None:
    assert is_life_of(name, actor) == is_it


def test_the_first_request_that_serve_proposes() -> None:
    assert "Bearer" not in curl_command("http://127.0.0.1:1", "big", GatewayConfig())
    tls = {"ca": "/ca.pem", "cert": "/c.pem", "key": "/k.pem"}
    said = curl_command(
        "https://10.0.0.1:1",
        "it's",
        GatewayConfig.model_validate({"api_keys": "/keys", "tls": tls}),
    )
    assert said.startswith("curl https://10.0.0.1:1/v1/completions ")
    assert '-H "Authorization: Bearer $KEY" --cacert /ca.pem' in said
    assert "'\\''" in said


# Input


@pytest.mark.parametrize(
    "wish", ["small", "small=", "=3", "small=-1", "small=x", "small=1.5", "small=99999"]
)
def test_a_wish_that_is_none(wish: str) -> None:
    with pytest.raises(InvalidRequest, match="POOL=N"):
        parse_wish(wish)


def test_a_wish() -> None:
    assert parse_wish("small=0") == ("small", 0)
    assert parse_wish("a=b=3") == ("a=b", 3)


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who serves nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


COMMANDS: list[tuple[str, ...]] = [
    ("status",),
    ("top",),
    ("down",),
    ("scale", "a=1"),
    ("drain", "a-0"),
    ("logs",),
    ("compare", "a", "b"),
]


@pytest.mark.parametrize("call", COMMANDS, ids="-".join)
def test_where_nothing_is_served_there_is_one_line(
    call: tuple[str, ...],
    nobody: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert outrider(monkeypatch, *call) == 2
    one_line_about("outrider serve", capsys)


@pytest.mark.parametrize("call", COMMANDS, ids="-".join)
def test_a_cluster_that_is_not_there(
    call: tuple[str, ...],
    nobody: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        assert outrider(monkeypatch, *call, "--address", address) == 2
    one_line_about(address, capsys)


def test_a_cluster_that_is_named_and_does_not_answer_does_not_cost_the_local_one(
    nobody: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(
        local_ray, "find", lambda: LocalRay("127.0.0.2:1", "http://127.0.0.1:2", tmp_path, 1, {})
    )
    monkeypatch.setattr(local_ray, "end", lambda ray: pytest.fail("the local Ray is ended"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert outrider(monkeypatch, "down") == 2
    one_line_about(address, capsys)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["/nowhere/file.yaml"], "/nowhere/file.yaml"),
        (["file.yaml", "--target", "x"], "either a file"),
        (["file.yaml", "--port", "8000"], "either a file or --port"),
        (["file.yaml", "--insecure"], "either a file or --insecure"),
        (["--port", "70000"], "port 70000"),
        (["--drafters", "-1"], "drafters -1"),
        (["--host", "0.0.0.0"], "0.0.0.0 has no api_keys and tls"),
        (["--target", "/nowhere/model"], "/nowhere/model"),
    ],
)
def test_serve_starts_nothing_that_cannot_be(
    arguments: list[str],
    named: str,
    nobody: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(local_ray, "start", lambda: pytest.fail("Ray is started"))
    assert outrider(monkeypatch, "serve", *arguments) == 2
    one_line_about(named, capsys)


# Logs


def test_the_end_of_what_a_process_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Context:
        def get_temp_dir(self) -> str:
            return str(tmp_path)

        def get_session_name(self) -> str:
            return "session"

    monkeypatch.setattr("ray.get_runtime_context", Context)
    folder = tmp_path / "session" / "logs"
    folder.mkdir(parents=True)
    (folder / "worker-a-7.out").write_text(":job_id:01\none\ntwo\n")
    (folder / "worker-a-7.err").write_bytes(b"three\xff\n:actor_name:x\nfour")
    (folder / "worker-a-77.out").write_text("of another process\n")
    assert tail(7, 3) == ["two", "three\N{REPLACEMENT CHARACTER}", "four"]
    assert tail(7, 100) == ["one", "two", "three\N{REPLACEMENT CHARACTER}", "four"]
    assert tail(8, 3) == []


# The deployment file


def test_the_example_is_a_deployment_and_names_every_field(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outrider(monkeypatch, "config", "--example") == 0
    example = yaml.safe_load(capsys.readouterr().out)
    found = Deployment.model_validate(example)
    named: dict[type[BaseModel], set[str]] = {}
    name_fields(Deployment, example, named)
    assert {
        kind: set(kind.model_fields) - fields
        for kind, fields in named.items()
        if set(kind.model_fields) != fields
    } == {}
    assert found.security.tls is not None


def name_fields(kind: type[BaseModel], given: Any, named: dict[type[BaseModel], set[str]]) -> None:
    """Which fields of each kind of value are named somewhere."""
    for one in given if isinstance(given, list) else [given] if given is not None else []:
        named.setdefault(kind, set()).update(one)
        for name, field in kind.model_fields.items():
            if (inner := model_in(field.annotation)) is not None:
                name_fields(inner, one.get(name), named)


def model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(
        (
            kind
            for part in getattr(annotation, "__args__", ())
            if (kind := model_in(part)) is not None
        ),
        None,
    )


def test_a_file_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("target: {model: big}\npools: [{name: a, method: ngram}]\n")
    assert outrider(monkeypatch, "config", file) == 0
    assert "target big, 1 replicas; pools: a (1 of ngram)" in capsys.readouterr().out
    assert outrider(monkeypatch, "config", file, "--json") == 0
    assert Deployment.model_validate(json.loads(capsys.readouterr().out)).pools[0].name == "a"
    file.write_text("target: {model: big, modle: x}")
    assert outrider(monkeypatch, "config", file) == 2
    one_line_about("target.modle", capsys)
    assert outrider(monkeypatch, "config") == 2
    one_line_about("--example", capsys)


# The local Ray


def test_a_local_ray_is_found_while_one_of_its_processes_is_there(
    nobody: None, tmp_path: Path
) -> None:
    assert local_ray.find() is None
    born = local_ray.process_birth(os.getpid())
    assert born is not None
    there = LocalRay("127.0.0.2:1", "http://127.0.0.1:2", tmp_path / "ray", 1, {os.getpid(): born})
    cache_folder().mkdir(parents=True)
    local_ray.record_file().write_bytes(local_ray.FORMAT.dump_json(there))
    assert local_ray.find() == there
    gone = replace(there, born={os.getpid(): born + 1})
    local_ray.record_file().write_bytes(local_ray.FORMAT.dump_json(gone))
    assert local_ray.find() is None, "another process of the same number"
    local_ray.record_file().write_text("nonsense")
    assert local_ray.find() is None


def test_only_processes_of_the_session_belong_to_it() -> None:
    assert os.getpid() in local_ray.session_processes(os.getsid(0))
    assert local_ray.session_processes(2**30) == {}
    assert local_ray.process_birth(2**30) is None


def test_a_ray_that_does_not_start_leaves_nothing(
    nobody: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no luck today\nexit 3\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(Unavailable, match="no luck today"):
        local_ray.start()
    assert local_ray.find() is None
    assert list(tmp_path.glob("outrider-*")) == []
