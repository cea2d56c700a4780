"""Fixtures for the job tests."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from actors.jobs import source


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gives the test a user without jobs, and empties the store in memory after it."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    yield
    memory = fsspec.filesystem("memory")
    if memory.exists("/jobs"):
        memory.rm("/jobs", recursive=True)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the job read its batch file in many pieces."""
    monkeypatch.setattr(source, "CHUNK_BYTES", 64)
