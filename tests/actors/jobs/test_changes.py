"""A job notices changes to its files, while it works and between two lives of it."""

import os
from itertools import count
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from actors.jobs import folders, items, registry
from actors.jobs.index import ItemResult, JobIndex, OutputMark, open_index
from actors.jobs.items import Answer
from actors.jobs.job import open_job
from actors.jobs.outputs import PartsOutput
from runtime.core.errors import InvalidRequest, OutriderError, Unavailable
from tests.actors.jobs.changes import (
    COUNT,
    Change,
    Meddler,
    appended,
    check,
    content,
    in_place,
    replaced,
)
from tests.support.jobs_harness import Echo, batch, line, live

pytestmark = pytest.mark.usefixtures("small_chunks")


SOURCE: dict[str, Change] = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size * 3 // 4),
    "emptied": lambda file: os.truncate(file, 0),
    "ids edited": lambda file: in_place(file, b'"custom_id": "item-19', b'"custom_id": "jtem-19'),
    "bodies edited": lambda file: in_place(file, b'"prompt": "item-19', b'"prompt": "jtem-19'),
    "what was read edited": lambda file: in_place(
        file, b'"custom_id": "item-0"', b'"custom_id": "jtem-0"'
    ),
    "grown": lambda file: appended(file, line("new").encode() + b"\n"),
    "its last line grown": lambda file: appended(file, b" "),
    "replaced": lambda file: replaced(file, line("other").encode()),
    "deleted": lambda file: file.unlink(),
    "a line taken out": lambda file: replaced(
        file, b"".join(file.read_bytes().splitlines(keepends=True)[:-1])
    ),
}


@pytest.mark.parametrize("where", ["file", "memory"])
@pytest.mark.parametrize("change", SOURCE.values(), ids=SOURCE)
def test_a_change_of_the_batch_file_ends_its_job_and_keeps_the_answers(
    change: Change, where: str, tmp_path: Path
) -> None:
    file = batch(tmp_path / "in.jsonl", COUNT)
    out = str(tmp_path / "out.jsonl") if where == "file" else "memory://jobs/changes/out.jsonl"
    before, first = file.read_bytes(), Meddler(lambda: change(file))
    with pytest.raises(
        InvalidRequest, match=r"in\.jsonl has changed since its job started"
    ) as caught:
        live(file, out, first)
    [job] = registry.list_jobs()
    assert job.state == "stopped"
    assert f"{job.totals.done} of {COUNT} items are answered in {out}" in str(caught.value)
    assert job.totals.done == first.asked.total(), "what was in flight is kept too"
    file.write_bytes(before)
    second = Echo()
    assert live(file, out, second)
    assert second.asked.total() == COUNT - job.totals.done
    with fsspec.open(out, "rb") as opened:
        check(opened.read(), job.record.id)
    assert registry.find_job(job.record.id).state == "finished"


@pytest.mark.parametrize("change", [change for name, change in SOURCE.items() if name != "deleted"])
def test_a_changed_batch_file_is_refused_until_it_is_restored(
    change: Change, tmp_path: Path
) -> None:
    file, out = batch(tmp_path / "in.jsonl", COUNT), tmp_path / "out.jsonl"
    before = file.read_bytes()
    assert not live(
        file, out, Meddler(lambda: registry.cancel_job(registry.list_jobs()[0].record.id))
    )
    [job], kept = registry.list_jobs(), out.read_bytes()
    change(file)
    with pytest.raises(
        InvalidRequest,
        match=rf"in\.jsonl has changed .*{job.totals.done} of {COUNT} items are answered",
    ):
        live(file, out, Echo())
    assert out.read_bytes() == kept
    file.rename(tmp_path / "changed.jsonl")
    with pytest.raises(InvalidRequest, match=r"cannot read .*in\.jsonl"):
        live(file, out, Echo())
    (tmp_path / "moved.jsonl").write_bytes(before)
    assert live(tmp_path / "moved.jsonl", out, Echo()), "the content counts, not the name"
    check(out.read_bytes(), job.record.id)


class Restless(MemoryFileSystem):
    """Adds a line to the file each time it is opened."""

    protocol = "restless"
    opened = count()

    def open(self, path: str, mode: str = "rb", *arguments: Any, **more: Any) -> Any:
        memory, lines = fsspec.filesystem("memory"), next(self.opened) + 1
        memory.pipe_file(
            "/jobs/restless", "".join(line(f"{number}") + "\n" for number in range(lines)).encode()
        )
        return memory.open("/jobs/restless", mode)


def test_a_file_that_changes_during_the_first_read_is_refused(
    tmp_path: Path,
) -> None:
    fsspec.register_implementation("restless", Restless, clobber=True)
    with (
        pytest.raises(InvalidRequest, match="changed while it was read"),
        open_job("restless://in.jsonl", str(tmp_path / "out.jsonl")),
    ):
        pytest.fail("it was begun")
    assert list(tmp_path.iterdir()) == []


OUTPUT: dict[str, Change] = {
    "truncated": lambda out: os.truncate(out, out.stat().st_size - 10),
    "emptied": lambda out: os.truncate(out, 0),
    "edited": lambda out: in_place(out, b"item-0 ", b"jtem-0 "),
    "grown in its middle": lambda out: out.write_bytes(
        out.read_bytes().replace(b"item-0 ", b"a longer one ")
    ),
    "appended to": lambda out: appended(out, b"mine\n"),
    "replaced": lambda out: replaced(out, out.read_bytes() + b"mine\n"),
    "replaced by one as long": lambda out: replaced(out, b"x" * out.stat().st_size),
    "deleted": lambda out: out.unlink(),
}


@pytest.mark.parametrize("change", OUTPUT.values(), ids=OUTPUT)
@pytest.mark.parametrize("when", ["at work", "between lives"])
def test_a_changed_output_is_left_alone_until_it_is_restored(
    change: Change, when: str, tmp_path: Path
) -> None:
    file, out, states = (
        batch(tmp_path / "in.jsonl", COUNT),
        tmp_path / "out.jsonl",
        list[bytes | None](),
    )

    def act() -> None:
        states.append(out.read_bytes())
        change(out)
        states.append(content(out))

    if when == "at work":
        with pytest.raises(OutriderError, match=r"out\.jsonl"):
            live(file, out, Meddler(act))
    else:
        assert not live(
            file, out, Meddler(lambda: registry.cancel_job(registry.list_jobs()[0].record.id))
        )
        act()
    for _ in range(2):
        with pytest.raises(OutriderError, match=r"out\.jsonl .*restore it"):
            live(file, out, Echo())
    before, left = states
    more = b""
    if left is not None and change is OUTPUT["edited"]:
        more = out.read_bytes()[
            len(left) :
        ]  # an edit that leaves file and size as they were is seen at the end only
    assert content(out) == (None if left is None else left + more)
    out.write_bytes((before or b"") + more)
    assert live(file, out, Echo())
    check(out.read_bytes(), registry.list_jobs()[0].record.id)


def test_removed_parts_are_noticed(tmp_path: Path) -> None:
    fs, file, out = (
        fsspec.filesystem("memory"),
        batch(tmp_path / "in.jsonl", COUNT),
        "memory://jobs/parts/out.jsonl",
    )
    parts: dict[str, bytes] = {}

    def act() -> None:
        path = fs.glob("/jobs/parts/out.jsonl.job/part-*")[0]
        parts[path] = fs.cat_file(path)
        fs.rm_file(path)

    for _ in range(2):
        with pytest.raises(InvalidRequest, match="answers are missing"):
            live(file, out, Meddler(act))
    assert not fs.exists(out), "it is no output while answers are missing"
    for path, data in parts.items():
        fs.pipe_file(path, data)
    assert live(file, out, Echo())
    check(fs.cat_file(out), registry.list_jobs()[0].record.id)
    fs.rm_file("/jobs/parts/out.jsonl")
    with pytest.raises(InvalidRequest, match="is missing"):
        live(file, out, Echo())


@pytest.mark.parametrize(
    "data", [b"nonsense\n", items.output_line("job", "another", Answer(200, {}))]
)
def test_parts_of_another_job_are_refused(data: bytes, tmp_path: Path) -> None:
    fs, file, out = (
        fsspec.filesystem("memory"),
        batch(tmp_path / "in.jsonl"),
        "memory://jobs/strange/out.jsonl",
    )
    with open_job(str(file), out):
        fs.pipe_file("/jobs/strange/out.jsonl.job/part-00000000-x", data)
    with pytest.raises(InvalidRequest, match=r"restore"):
        live(file, out, Echo())


def test_an_index_of_another_version_is_refused(tmp_path: Path) -> None:
    file, out = batch(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    assert live(file, out, Echo())
    index = tmp_path / "out.jsonl.job" / folders.INDEX
    with open_index(index) as old:
        old._base.execute("PRAGMA user_version = 0")
    with pytest.raises(Unavailable, match="another version"):
        live(file, out, Echo())


def test_answers_to_unknown_items_are_refused_as_a_whole(tmp_path: Path) -> None:
    with open_job(str(batch(tmp_path / "in.jsonl")), str(tmp_path / "out.jsonl")) as job:
        index: JobIndex = job._index
        with pytest.raises(InvalidRequest, match="unknown items"):
            index.save(
                [ItemResult("item-0", 200, 1), ItemResult("another", 200, 1)], OutputMark(10, "x")
            )
        assert index.mark() == OutputMark()
        assert index.totals().done == 0


def test_an_output_is_finished_only_when_every_item_is_answered(tmp_path: Path) -> None:
    with open_job(str(batch(tmp_path / "in.jsonl")), str(tmp_path / "out.jsonl")) as job:
        with pytest.raises(Unavailable, match="5 items have no answer"):
            job.finish()
        assert not job._index.finished()


def test_an_output_at_a_url_names_its_job() -> None:
    fs = fsspec.filesystem("memory")
    assert PartsOutput(fs, "/jobs/known/out").begin("job-1", "print") == "job-1"
    assert PartsOutput(fs, "/jobs/known/out").begin("job-2", "print") == "job-1"
