"""The commands for a served fleet check their input and start nothing."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from actors.cli.commands.drain import sessions_left
from actors.cli.commands.logs import is_life_of, tail
from actors.cli.commands.scale import is_settled, parse_wish, raise_given_up
from actors.cli.commands.serve import curl_command
from actors.launch import local_ray
from actors.launch.local_ray import LocalRay
from runtime.config import GatewayConfig
from runtime.core.errors import InvalidRequest, Unavailable
from tests.support.command import assert_one_error_line, outrider
from tests.support.fleets import FLEET


def test_scaling_and_draining_end() -> None:
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
def test_actor_names_belong_to_their_pool_member(name: str, actor: str, is_it: bool) -> None:
    assert is_life_of(name, actor) == is_it


def test_serve_prints_a_curl_command_that_works() -> None:
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


@pytest.mark.parametrize(
    "size", ["small", "small=", "=3", "small=-1", "small=x", "small=1.5", "small=99999"]
)
def test_an_invalid_pool_size_is_refused(size: str) -> None:
    with pytest.raises(InvalidRequest, match="POOL=N"):
        parse_wish(size)


def test_a_pool_size_is_parsed() -> None:
    assert parse_wish("small=0") == ("small", 0)
    assert parse_wish("a=b=3") == ("a=b", 3)


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
def test_without_a_served_fleet_the_error_is_one_line(
    call: tuple[str, ...],
    nobody: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert outrider(monkeypatch, *call) == 2
    assert_one_error_line("outrider serve", capsys)


@pytest.mark.parametrize("call", COMMANDS, ids="-".join)
def test_an_unreachable_cluster_is_named(
    call: tuple[str, ...],
    nobody: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        assert outrider(monkeypatch, *call, "--address", address) == 2
    assert_one_error_line(address, capsys)


def test_down_with_an_unreachable_cluster_leaves_the_local_ray_alone(
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
    assert_one_error_line(address, capsys)


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
def test_serve_refuses_wrong_arguments_before_it_starts_ray(
    arguments: list[str],
    named: str,
    nobody: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(local_ray, "start", lambda: pytest.fail("Ray is started"))
    assert outrider(monkeypatch, "serve", *arguments) == 2
    assert_one_error_line(named, capsys)


def test_logs_are_the_last_lines_of_both_streams(
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
