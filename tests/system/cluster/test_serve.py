"""`outrider serve` that is ended while it starts: nothing of what it has started is left."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from actors.launch import local_ray
from tests.support.pair import save_model
from tests.support.paths import ROOT
from tests.system.cluster.test_command import PATIENCE_S

pytestmark = pytest.mark.cluster


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where all files of Ray and of the command go. Its name is short: Ray keeps sockets there."""
    with TemporaryDirectory(prefix="o-") as folder:
        for name in ("XDG_CACHE_HOME", "TMPDIR"):
            monkeypatch.setenv(name, folder)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        yield Path(folder)


@pytest.mark.parametrize("moment", ["gcs_server", "ray::TargetActor"])
def test_sigterm_in_mid_start_leaves_no_ray_behind(moment: str, home: Path, tmp_path: Path) -> None:
    arguments = [
        "serve",
        "--target",
        str(save_model(tmp_path / "model")),
        "--draft",
        "ngram",
        "--port",
        "0",
    ]
    call = [sys.executable, "-c", "from actors.cli import main; main()", *arguments]
    sessions: set[int] = set()
    with subprocess.Popen(
        call, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as running:

        def reached() -> bool:
            assert running.poll() is None, "it has ended by itself"
            sessions.update(rays(home))
            return any(
                moment in called(pid)
                for session in sessions
                for pid in local_ray.session_processes(session)
            )

        await_(reached, moment)
        running.send_signal(signal.SIGTERM)
        said, _ = running.communicate(timeout=PATIENCE_S)
        assert running.returncode != 0, said
    await_(
        lambda: not any(map(local_ray.session_processes, sessions | rays(home))), "the end of Ray"
    )
    assert not [*home.glob("outrider-*")]
    assert local_ray.find() is None
    assert not local_ray.record_file().exists()


def rays(home: Path) -> set[int]:
    """Sessions of the processes of a Ray that keeps its files there."""
    found = (int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdecimal())
    return {
        int(status[3])
        for pid in found
        if str(home) in called(pid) and (status := local_ray.read_stat(pid))
    }


def called(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def await_(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.02)
