"""Kept answers survive a power loss: the disk forgets whatever was not synced."""

import asyncio
import os
import stat
from contextlib import suppress
from pathlib import Path

import pytest

from actors.jobs import folders
from actors.jobs import job as jobs
from actors.jobs.index import open_index
from actors.jobs.job import open_job
from actors.jobs.outputs import Destination, FileOutput
from actors.jobs.worker import answer_job
from tests.support.jobs_harness import Echo, answers, batch

COUNT = 20


class Forgetful:
    """Is a folder on a disk with a cache.

    `lose_power` leaves only the entries and bytes that were synced.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: set[str] = set()
        self.content: dict[int, bytes] = {}  # by inode

    def sync(self, file: int) -> None:
        found = os.fstat(file)
        if stat.S_ISDIR(found.st_mode):
            self.entries = set(os.listdir(file))
        else:
            self.content[found.st_ino] = os.pread(file, found.st_size, 0)

    def lose_power(self) -> None:
        for path in self.folder.glob("*.jsonl"):
            if path.name in self.entries:
                path.write_bytes(self.content.get(path.stat().st_ino, b""))
            else:
                path.unlink()


@pytest.mark.parametrize("when", [1, 2, 7, COUNT])
def test_what_is_kept_survives_the_loss_of_power(
    when: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The power fails at the given item; kept answers are not asked for again, and occur once."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    (tmp_path / "out").mkdir()
    file, out, disk = (
        batch(tmp_path / "in.jsonl", COUNT),
        tmp_path / "out" / "out.jsonl",
        Forgetful(tmp_path / "out"),
    )
    monkeypatch.setattr(
        jobs, "resolve_output", lambda url: Destination(FileOutput(out, disk.sync), out)
    )

    def life(answerer: Echo, limit: int) -> int:
        """Ends before an item beyond `limit` is answered; returns how many have an answer."""
        with open_job(str(file), str(out)) as job:

            def show(totals: object) -> None:
                if answerer.asked.total() >= limit:
                    raise KeyboardInterrupt

            with suppress(KeyboardInterrupt):
                asyncio.run(answer_job(job, answerer, 1, show))
            return job.totals.done

    kept = life(Echo(), when)
    assert kept == when
    disk.lose_power()
    second = Echo()
    assert life(second, COUNT + 1) == COUNT
    assert second.asked.total() == COUNT - kept
    disk.lose_power()
    assert len(answers(out.read_bytes())) == COUNT


def test_the_index_waits_for_the_disk_at_each_commit(tmp_path: Path) -> None:
    """SQLite's own default loses the last commits of a write-ahead log with the power."""
    with open_index(tmp_path / folders.INDEX) as index:
        assert index._one("PRAGMA synchronous") == 2
        assert index._base.execute("PRAGMA journal_mode").fetchone() == ("wal",)
