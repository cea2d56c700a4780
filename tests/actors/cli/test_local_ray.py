"""The command line finds, starts and ends the Ray of this machine."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from actors.launch import local_ray
from actors.launch.local_ray import LocalRay
from runtime.core.cache_folder import cache_folder
from runtime.core.errors import Unavailable


def test_a_local_ray_is_found_while_one_of_its_processes_runs(nobody: None, tmp_path: Path) -> None:
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


def test_a_ray_that_fails_to_start_leaves_nothing_behind(
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
