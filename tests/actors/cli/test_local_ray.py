"""The command line finds, starts and ends the Ray of this machine."""

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    made: list[str] = []

    def make(**options: Any) -> str:
        made.append(tempfile.mkdtemp(**options))
        return made[-1]

    monkeypatch.setattr(local_ray, "mkdtemp", make)
    with pytest.raises(Unavailable, match="no luck today"):
        local_ray.start()
    assert local_ray.find() is None
    (folder,) = made
    assert not Path(folder).exists()


def test_a_long_folder_for_temporary_files_is_not_used(
    nobody: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):
        pass

    def make(**options: Any) -> str:
        raise Asked(options["dir"])

    monkeypatch.setattr(local_ray, "mkdtemp", make)
    for length, place in ((20, "/" + "x" * 19), (90, "/tmp")):
        monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * (length - 1))
        with pytest.raises(Asked) as asked:
            local_ray.start()
        assert asked.value.args == (Path(place),)
