"""A job that is killed anywhere, any number of times, answers each item exactly once."""

from pathlib import Path
from tempfile import TemporaryDirectory

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.jobs import folders, items
from actors.jobs import job as jobs
from actors.jobs.index import open_index
from actors.jobs.lease import Lease
from actors.jobs.outputs import Destination, FileOutput, PartsOutput
from tests.support.jobs_harness import (
    Doom,
    DoomedFiles,
    DoomedIndex,
    DoomedOutput,
    Echo,
    Killed,
    answers,
    batch,
    live,
    said,
)

COUNT = 3


def life(file: Path, out: str, answerer: Echo, last: int) -> bool:
    """One life that ends at the `last`th point; whether it was not killed before its end."""
    doom = Doom(last)

    class Mortal(DoomedIndex):
        pass

    Mortal.doom = doom

    def destination(url: str) -> Destination:
        fs, path = fsspec.core.url_to_fs(url)
        if "memory" in fs.protocol:
            doomed = DoomedFiles(fs, doom)
            return Destination(
                PartsOutput(doomed, path), lease=Lease(doomed, path + folders.SUFFIX)
            )
        return Destination(DoomedOutput(FileOutput(Path(path)), doom), Path(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "JobIndex", Mortal)
        patch.setattr(jobs, "resolve_output", destination)
        try:
            return live(file, out, answerer)
        except Killed:
            return False


def check(out: str, memory: bool) -> None:
    """All items once, with the seeds of the job."""
    with fsspec.open(out, "rb") as opened:
        found = answers(opened.read())
    with open_index(
        folders.state_folder(out, None if memory else Path(out)) / folders.INDEX
    ) as index:
        record, totals = index.record(), index.totals()
    assert record is not None
    assert sorted(found) == [f"item-{number}" for number in range(COUNT)]
    for name, one in found.items():
        assert one["response"]["body"] == said(name, items.item_seed(record.id, name))
    assert (totals.items, totals.done, totals.failed, totals.tokens) == (COUNT, COUNT, 0, 3 * COUNT)


@pytest.mark.parametrize("where", ["file", "memory"])
def test_a_kill_at_any_point_loses_and_doubles_nothing(where: str, tmp_path: Path) -> None:
    file = batch(tmp_path / "in.jsonl", COUNT)
    out = "memory://jobs/{}/out.jsonl" if where == "memory" else str(tmp_path / "{}.jsonl")
    last, killed = 0, True
    while killed:
        last += 1
        this = out.format(last)
        killed = not life(file, this, Echo("a long request id"), last)
        assert life(file, this, Echo(), 0)
        check(this, where == "memory")
    assert last > 20, "the points are those of a whole life"


@given(st.lists(st.integers(1, 30), max_size=8), st.sampled_from(["file", "memory"]))
@settings(max_examples=20)
def test_kills_in_many_lives_lose_and_double_nothing(deaths: list[int], where: str) -> None:
    with TemporaryDirectory() as folder:
        file = batch(Path(folder) / "in.jsonl", COUNT)
        out = f"memory://jobs{folder}/out.jsonl" if where == "memory" else f"{folder}/out.jsonl"
        for number, last in enumerate(deaths):
            life(file, out, Echo("r" * (len(deaths) - number)), last)
        assert life(file, out, Echo(), 0)
        check(out, where == "memory")


def test_what_was_kept_is_not_asked_again(tmp_path: Path) -> None:
    file, out = batch(tmp_path / "in.jsonl", COUNT), str(tmp_path / "out.jsonl")
    second, last, left = Echo(), 1, list(range(COUNT))
    while len(left) == COUNT:
        life(file, out, Echo(), last)
        last += 1
        with open_index(tmp_path / "out.jsonl.job" / folders.INDEX) as index:
            left = [line for line, _ in index.unanswered()] if index.record() else left
    assert left, "it was killed before its end"
    assert life(file, out, second, 0)
    assert sorted(second.asked) == [f"item-{number - 1}" for number in left]
    check(out, memory=False)


def test_parts_are_taken_up_where_there_is_no_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = batch(tmp_path / "in.jsonl", COUNT), "memory://jobs/moved/out.jsonl"
    first, second = Echo(), Echo()
    last = 1
    while len(fsspec.filesystem("memory").glob("/jobs/moved/out.jsonl.job/part-*")) < 1:
        life(file, out, first, last)
        last += 1
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "another"))
    assert life(file, out, second, 0)
    assert 0 < len(second.asked) < COUNT
    check(out, memory=True)
    assert fsspec.filesystem("memory").ls("/jobs/moved/out.jsonl.job", detail=False) == [
        "/jobs/moved/out.jsonl.job/job.json"
    ]
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "a third"))
    third = Echo()
    assert life(file, out, third, 0)
    assert not third.asked
    check(out, memory=True)


def test_two_who_work_on_one_url_still_give_each_item_once(tmp_path: Path) -> None:
    """Neither sees the lease of the other."""
    file, out = batch(tmp_path / "in.jsonl", COUNT), "memory://jobs/both/out.jsonl"
    last = 1
    while not fsspec.filesystem("memory").glob("/jobs/both/out.jsonl.job/part-*"):
        life(file, out, Echo(), last)
        last += 1
    fs, path = fsspec.core.url_to_fs(out)
    [part] = fs.glob(f"{path}.job/part-*")
    fs.pipe_file(part.replace(part[-12:], "another"), fs.cat_file(part))
    assert life(file, out, Echo(), 0)
    check(out, memory=True)
