"""Starting a Ray of one's own, whose node may not come up."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.fleet.ray_session import ray_cluster, socket_folder
from runtime.core.errors import Unavailable

HUNG = "The current node timed out during startup. This could happen because the raylet failed."


class Starts:
    """Ray's `init`, which raises these errors one after the other, then starts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> None:
        self.errors, self.calls, self.ends = list(errors), list[dict[str, Any]](), 0
        monkeypatch.setattr(ray, "init", self.init)
        monkeypatch.setattr(ray, "shutdown", self.shutdown)

    def init(self, **options: Any) -> None:
        self.calls.append(options)
        if self.errors:
            raise self.errors.pop(0)

    def shutdown(self) -> None:
        self.ends += 1


def test_a_node_that_does_not_come_up_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = Starts(monkeypatch, Exception(HUNG))
    with ray_cluster(None, cpus=3):
        assert starts.ends == 1
    assert [call["num_cpus"] for call in starts.calls] == [3, 3]
    assert starts.calls[0] == starts.calls[1]
    assert starts.ends == 2


@pytest.mark.parametrize(
    ("errors", "calls"),
    [
        ((Exception(HUNG), Exception(HUNG)), 2),
        ((Exception("GCS is overloaded"),), 1),
        ((OSError("no space left"),), 1),
    ],
)
def test_a_ray_that_does_not_start_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, errors: tuple[Exception, ...], calls: int
) -> None:
    starts = Starts(monkeypatch, *errors)
    with (
        pytest.raises(Unavailable, match=r"Ray does not start on this machine .* --in-process"),
        ray_cluster(None),
    ):
        pass
    assert len(starts.calls) == calls


@pytest.mark.parametrize(
    ("length", "explicit", "given"), [(30, "", None), (90, "", "/tmp/ray"), (90, "/t", None)]
)
def test_a_long_folder_for_temporary_files_does_not_keep_ray_from_its_sockets(
    monkeypatch: pytest.MonkeyPatch, length: int, explicit: str, given: str | None
) -> None:
    """RAY_TMPDIR is the user's choice, which stays."""
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * (length - 1))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    if explicit:
        monkeypatch.setenv("RAY_TMPDIR", explicit)
    starts = Starts(monkeypatch)
    with ray_cluster(None):
        pass
    assert starts.calls[0].get("_temp_dir") == given


def test_every_socket_has_a_path_that_the_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    socket = "session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store"
    folders = set()
    for length in range(2, 120):
        monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * (length - 1))
        found = socket_folder("ray")
        assert len(str(found / socket)) <= 107
        folders.add(found.parent == Path(tempfile.gettempdir()))
    assert folders == {True, False}


def test_a_path_that_is_too_long_all_the_same_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Starts(monkeypatch, OSError("AF_UNIX path length cannot exceed 107 bytes: /t/ray/session_1"))
    with (
        pytest.raises(Unavailable, match="set RAY_TMPDIR to a path of at most 40"),
        ray_cluster(None),
    ):
        pass
