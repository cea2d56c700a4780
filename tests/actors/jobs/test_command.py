"""The job commands survive kills at random moments and Ctrl-C, and report their state."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import outrider
from tests.support.jobs_harness import answers, batch, line, said
from tests.support.paths import ROOT

PATIENCE_S = 240.0


class Gateway(ThreadingHTTPServer):
    """Answers each prompt with itself and its seed.

    reached  set at the `awaited`th request
    seeds    of each prompt
    names    Idempotency-Keys of each prompt
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.requests = 0
        self.expect(0)
        self.seeds: defaultdict[str, set[int]] = defaultdict(set)
        self.keys: set[str | None] = set()
        self.names: defaultdict[str, set[str]] = defaultdict(set)

    def expect(self, more: int) -> None:
        self.reached, self.awaited = threading.Event(), self.requests + more

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no news."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Gateway
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.reply({"data": []})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.requests += 1
            self.server.keys.add(self.headers["authorization"])
            self.server.seeds[body["prompt"]].add(body["seed"])
            self.server.names[body["prompt"]].add(self.headers["idempotency-key"])
            if self.server.requests == self.server.awaited:
                self.server.reached.set()
        self.reply(said(body["prompt"], body["seed"]))

    def reply(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - of http.server
        """Logs nothing."""


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    server = Gateway()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from actors.cli import main; main()", *map(str, arguments)]


def started(*arguments: object) -> subprocess.Popen[str]:
    # Where the tests run in the background, Ctrl-C is ignored, and what they start inherits that.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command(*arguments), cwd=ROOT, text=True, preexec_fn=heed, **pipes)  # noqa: PLW1509


def captured_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    """Returns the exit code, standard output and standard error of the command."""
    code = outrider(monkeypatch, *arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_command_that_is_killed_at_random_moments_answers_each_item_once(
    gateway: Gateway, tmp_path: Path
) -> None:
    count, moments = 240, random.Random(5)
    file, out = batch(tmp_path / "in.jsonl", count), tmp_path / "out.jsonl"
    call = ("submit", file, "-o", out, "--url", gateway.url, "--parallel", 8, "--json")
    kills = 0
    for blow in (signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        gateway.expect(moments.randint(1, count // 8))
        with started(*call) as running:
            assert gateway.reached.wait(PATIENCE_S)
            running.send_signal(blow)
            running.communicate(timeout=PATIENCE_S)
            assert running.returncode == (130 if blow == signal.SIGINT else -blow)
            kills += 1
    assert kills == 4
    done = subprocess.run(
        command(*call), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["items"], summary["done"], summary["failed"], summary["tokens"]) == (
        count,
        count,
        0,
        3 * count,
    )
    found = answers(out.read_bytes())
    assert sorted(found) == sorted(f"item-{number}" for number in range(count))
    for name, one in found.items():
        [seed] = gateway.seeds[name]  # the same in each life
        assert one["response"]["body"] == said(name, seed)
    assert [len(names) for names in gateway.names.values()] == [1] * count, (
        "an item has one key in all lives of its job"
    )
    assert len(set().union(*gateway.names.values())) == count, "no two items have one key"
    assert count <= gateway.requests < count + 5 * 8 + 1, "only what was in flight was asked again"


def test_the_key_is_sent_and_the_end_is_told(
    gateway: Gateway,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, out, key = batch(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", tmp_path / "key"
    key.write_text("sk-test")
    with file.open("a") as more:
        more.write(json.dumps({"custom_id": "crooked"}) + "\n")
    call = ("submit", file, "-o", out, "--url", gateway.url, "--api-key-file", key)
    code, shown, said_so = captured_run(capsys, monkeypatch, *call)
    assert (code, shown) == (0, "")
    assert said_so.splitlines()[-1].endswith(f"6 items, 1 of them failed: {out}")
    assert gateway.keys == {"Bearer sk-test"}
    asked = gateway.requests
    code, _, _ = captured_run(
        capsys, monkeypatch, "submit", file, "-o", out, "--url", "http://127.0.0.1:1/v1"
    )
    assert (code, gateway.requests) == (0, asked), "where nothing is left, nobody need answer"
    code, shown, _ = captured_run(capsys, monkeypatch, "jobs", "--json")
    assert code == 0
    listed = json.loads(shown)
    assert (listed["state"], listed["done"], listed["failed"], listed["output"]) == (
        "finished",
        6,
        1,
        str(out),
    )
    code, shown, _ = captured_run(capsys, monkeypatch, "jobs")
    assert (code, listed["id"] in shown) == (0, True)
    code, shown, _ = captured_run(capsys, monkeypatch, "jobs", listed["id"])
    assert code == 0
    assert f"{listed['id']} finished: 6 of 6 items, 1 of them failed" in shown


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["FILE"], "--output"),
        (["/nowhere/in.jsonl", "-o", "OUT"], "/nowhere/in.jsonl"),
        (["EMPTY", "-o", "OUT"], "no items"),
        (["BROKEN", "-o", "OUT"], "line 2"),
        (["TWICE", "-o", "OUT"], "line 2 has the custom_id of line 1"),
        (["FILE", "-o", "TAKEN"], "taken.jsonl exists"),
        (["FILE", "-o", "/nowhere/out.jsonl"], "/nowhere"),
        (["FILE", "-o", "OUT", "--parallel", "0"], "parallel 0"),
        (["FILE", "-o", "OUT", "--url", "http://127.0.0.1:1/v1"], "http://127.0.0.1:1/v1"),
        (
            [
                "FILE",
                "-o",
                "OUT",
                "--url",
                "http://127.0.0.1:1/v1",
                "--api-key-file",
                "/nowhere/key",
            ],
            "/nowhere/key",
        ),
        (["FILE", "-o", "OUT", "--api-key-file", "/nowhere/key"], "--url"),
        (["FILE", "-o", "OUT", "--address", "127.0.0.1:1"], "127.0.0.1:1"),
    ],
)
def test_one_line_names_the_value(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = {
        "FILE": line("a"),
        "EMPTY": "\n",
        "BROKEN": f"{line('a')}\n{{",
        "TWICE": f"{line('a')}\n{line('a')}",
        "TAKEN": "mine",
    }
    for name, content in files.items():
        (tmp_path / f"{name.lower()}.jsonl").write_text(content)
    paths = [
        str(tmp_path / f"{word.lower()}.jsonl") if word.isupper() else word for word in arguments
    ]
    code, shown, said_so = captured_run(capsys, monkeypatch, "submit", *paths)
    assert (code, shown) == (2, "")
    assert said_so.startswith("outrider: ")
    assert said_so.count("\n") == 1, said_so
    assert named in said_so
    assert (tmp_path / "taken.jsonl").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["job-none"], "job-none"), (["--cancel"], "--cancel"), (["x", "--cancel"], "x")],
)
def test_a_job_that_is_not_there_is_named(
    arguments: list[str],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, shown, said_so = captured_run(capsys, monkeypatch, "jobs", *arguments)
    assert (code, shown) == (2, "")
    assert named in said_so


def test_a_job_that_runs_is_cancelled_from_outside(
    gateway: Gateway,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, out = batch(tmp_path / "in.jsonl", 2000), tmp_path / "out.jsonl"
    gateway.expect(20)
    call = ("submit", file, "-o", out, "--url", gateway.url, "--parallel", 2)
    with started(*call) as running:
        assert gateway.reached.wait(PATIENCE_S)
        os.kill(running.pid, signal.SIGSTOP)  # so that it cannot finish meanwhile
        [listed] = [
            json.loads(text)
            for text in captured_run(capsys, monkeypatch, "jobs", "--json")[1].splitlines()
        ]
        assert listed["state"] == "running"
        code, _, refused = captured_run(capsys, monkeypatch, *call)
        assert (code, f"process {running.pid}" in refused) == (2, True)
        assert captured_run(capsys, monkeypatch, "jobs", listed["id"], "--cancel")[0] == 0
        os.kill(running.pid, signal.SIGCONT)
        _, said_so = running.communicate(timeout=PATIENCE_S)
        assert running.returncode == 2
        assert "was cancelled after" in said_so
    [listed] = [
        json.loads(text)
        for text in captured_run(capsys, monkeypatch, "jobs", "--json")[1].splitlines()
    ]
    assert listed["state"] == "cancelled"
    assert listed["done"] == len(answers(out.read_bytes())) < 2000
