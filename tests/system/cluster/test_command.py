"""The command on a Ray of its own writes the same tokens and leaves nothing after Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.support.command import outrider
from tests.support.pair import save_model
from tests.support.paths import ROOT

PATIENCE_S = 240.0
pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "deep", num_hidden_layers=16))


def command(*arguments: object) -> list[str]:
    return [
        sys.executable,
        "-c",
        "from actors.cli import main; main()",
        "generate",
        *map(str, arguments),
    ]


def descendants(pid: int) -> set[int]:
    """Process ids of all that this process has started, and what they have started."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child} | descendants(child)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_with_and_without_ray_and_drafter_the_tokens_are_the_same(
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The schedule is one that always drafts: the living one rests what does not pay."""
    common = (
        "--target",
        model,
        "--prompt",
        "def f(",
        "--max-tokens",
        60,
        "--temperature",
        0.7,
        "--seed",
        4,
        "--json",
    )
    call = command(*common, "--draft", model, "--schedule", "sync")
    elsewhere = os.environ | {
        "RAY_ADDRESS": "127.0.0.1:1"
    }  # it starts a Ray of its own all the same
    done = subprocess.run(
        call,
        cwd=ROOT,
        env=elsewhere,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    found = [json.loads(done.stdout)]
    for more in (["--draft", model, "--schedule", "sync"], ["--speculation", "off"]):
        capsys.readouterr()
        assert outrider(monkeypatch, "generate", *common, *more, "--in-process") == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["token_ids"] == found[1]["token_ids"] == found[2]["token_ids"]
    assert found[0]["text"] == found[2]["text"]
    assert found[0]["metrics"]["outrider"]["nodes_drafted"] > 0


def test_ctrl_c_ends_everything_that_was_started(model: str) -> None:
    call = command(
        "--target",
        model,
        "--speculation",
        "off",
        "--prompt",
        "def f(",
        "--max-tokens",
        4000,
        "--ignore-eos",
    )
    # Where the tests run in the background, Ctrl-C is ignored, and what they start inherits that.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        call,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=heed,  # noqa: PLW1509
    ) as running:
        assert running.stdout is not None
        assert os.read(running.stdout.fileno(), 1)  # the first text is there
        started = descendants(running.pid)
        assert len(started) >= 4, "Ray and the actors"
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=PATIENCE_S)
        assert running.returncode == 130
    deadline = time.monotonic() + PATIENCE_S
    while left := {pid for pid in started if alive(pid)}:
        assert time.monotonic() < deadline, f"processes {left} are still there"
        time.sleep(0.1)
