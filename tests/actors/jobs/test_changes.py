"""A batch file, an output or the state of a job that somebody else changes, while the job is at work or between two lives of it."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from actors.jobs import folders, items, registry, source
from actors.jobs.index import ItemResult, JobIndex, OutputMark, open_index
from actors.jobs.items import Answer, Item
from actors.jobs.job import open_job
from actors.jobs.lease import LEASE_S, Lease
from actors.jobs.outputs import FileOutput, PartsOutput
from runtime.core.errors import InvalidRequest, OutriderError, Unavailable
from tests.support.jobs_harness import Echo, answers, batch, line, live, said

COUNT = 200  # items: more than is read ahead
Change = Callable[[Path], object]


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(source, "CHUNK_BYTES", 64)
    yield
    memory = fsspec.filesystem("memory")
    if memory.exists("/jobs"):
        memory.rm("/jobs", recursive=True)


class Meddler(Echo):
    """Somebody else acts when the `when`th item is asked."""

    def __init__(self, act: Callable[[], object], when: int = 5) -> None:
        super().__init__()
        self.act, self.when = act, when

    async def answer(self, item: Item) -> Answer:
        if self.asked.total() == self.when:
            self.act()
        return await super().answer(item)


def in_place(file: Path, old: bytes, new: bytes) -> None:
    """The same file, as long as before."""
    content = file.read_bytes()
    assert old in content
    assert len(old) == len(new)
    with file.open("r+b") as opened:
        opened.write(content.replace(old, new))


def replaced(file: Path, content: bytes) -> None:
    other = file.with_name("another")
    other.write_bytes(content)
    other.replace(file)


def appended(file: Path, content: bytes) -> None:
    with file.open("ab") as opened:
        opened.write(content)


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


def check(out: bytes, job: str) -> None:
    """Each item has its own answer once."""
    found = answers(out)
    assert found.keys() == {f"item-{number}" for number in range(COUNT)}
    for name, one in found.items():
        assert one["response"]["body"] == said(name, items.item_seed(job, name))


@pytest.mark.parametrize("where", ["file", "memory"])
@pytest.mark.parametrize("change", SOURCE.values(), ids=SOURCE)
def test_a_batch_file_that_changes_under_its_job_ends_it_and_what_was_answered_is_kept(
    change: Change, where: str, tmp_path: Path
) -> None:
    file = batch(tmp_path / "in.jsonl", COUNT)
    out = str(tmp_path / "out.jsonl") if where == "file" else "memory://jobs/changes/out.jsonl"
    before, first = file.read_bytes(), Meddler(lambda: change(file))
    with pytest.raises(
        InvalidRequest, match=r"in\.jsonl has changed since its job began"
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
def test_a_batch_file_that_changes_between_two_lives_is_refused_until_it_is_back(
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
    """Each time that a file is opened it has one more line."""

    protocol = "restless"
    opened = count()

    def open(self, path: str, mode: str = "rb", *arguments: Any, **more: Any) -> Any:
        memory, lines = fsspec.filesystem("memory"), next(self.opened) + 1
        memory.pipe_file(
            "/jobs/restless", "".join(line(f"{number}") + "\n" for number in range(lines)).encode()
        )
        return memory.open("/jobs/restless", mode)


def test_a_file_that_changes_while_it_is_read_for_the_first_time_is_refused_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    fsspec.register_implementation("restless", Restless, clobber=True)
    with (
        pytest.raises(InvalidRequest, match="has changed while it was read"),
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


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


@pytest.mark.parametrize("change", OUTPUT.values(), ids=OUTPUT)
@pytest.mark.parametrize("when", ["at work", "between lives"])
def test_an_output_that_somebody_else_changes_is_left_as_it_is_and_goes_on_when_it_is_back(
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
        with pytest.raises(OutriderError, match=r"out\.jsonl .*bring it back"):
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


def test_what_a_user_puts_where_an_output_was_to_be_is_not_cut_off(tmp_path: Path) -> None:
    file, out = batch(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    with open_job(str(file), str(out)):
        pass  # killed before the first answer
    out.write_text("precious\n")
    with pytest.raises(InvalidRequest, match="more in it than its job has written"):
        live(file, out, Echo())
    assert out.read_text() == "precious\n"


@pytest.mark.parametrize(
    "tail", [items.LINE_PREFIX[:5], items.LINE_PREFIX + b'0", "custom', b"\0\0\0", b""]
)
def test_what_a_kill_or_the_loss_of_power_leaves_is_cut_off(tail: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    output = FileOutput(out)
    output.resume(OutputMark())
    mark = output.append(b"whole\n")
    appended(out, tail)
    FileOutput(out).resume(mark)
    assert out.read_bytes() == b"whole\n"


def test_two_links_to_one_output_are_one_output(tmp_path: Path) -> None:
    file, other, out = (
        batch(tmp_path / "in.jsonl", COUNT),
        batch(tmp_path / "other.jsonl", 3),
        tmp_path / "out.jsonl",
    )
    (tmp_path / "link.jsonl").symlink_to(out)

    def second() -> None:
        with pytest.raises(Unavailable, match="works on the job"):
            live(other, tmp_path / "link.jsonl", Echo())

    assert live(file, out, Meddler(second, when=0))
    [job] = registry.list_jobs()
    check(out.read_bytes(), job.record.id)
    with pytest.raises(InvalidRequest, match=r"another file, .*in\.jsonl"):
        live(other, tmp_path / "link.jsonl", Echo())
    assert live(file, tmp_path / "link.jsonl", Echo())


def test_two_hard_links_taken_at_one_time_end_in_an_error_and_not_in_a_mixture(
    tmp_path: Path,
) -> None:
    file, other, out = (
        batch(tmp_path / "in.jsonl", COUNT),
        batch(tmp_path / "other.jsonl", 3),
        tmp_path / "out.jsonl",
    )
    out.touch()
    os.link(out, tmp_path / "link.jsonl")
    with (
        ThreadPoolExecutor() as pool,
        pytest.raises(InvalidRequest, match="changed by somebody else"),
    ):
        live(
            file,
            out,
            Meddler(
                lambda: pool.submit(live, other, tmp_path / "link.jsonl", Echo()).result(), when=0
            ),
        )
    assert len(answers(out.read_bytes())) == 3, "the other one's, whole"


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_an_output_that_is_no_file_is_refused(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    match kind:
        case "folder":
            out.mkdir()
        case "pipe":
            os.mkfifo(out)
        case _:
            out.symlink_to("/dev/null")
    with pytest.raises(InvalidRequest, match="no regular file"):
        live(batch(tmp_path / "in.jsonl"), out, Echo())


def test_a_folder_that_was_there_before_keeps_what_is_in_it(tmp_path: Path) -> None:
    file, folder = tmp_path / "in.jsonl", tmp_path / "out.jsonl.job"
    file.write_text("nonsense\n")
    folder.mkdir()
    for names in ([], ["precious", "index.txt"]):
        for name in names:
            (folder / name).write_text("mine")
        with pytest.raises(InvalidRequest, match="line 1"):
            live(file, tmp_path / "out.jsonl", Echo())
        assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_the_owner_of_a_job_is_named_whoever_had_it_before(tmp_path: Path) -> None:
    file, out = str(batch(tmp_path / "in.jsonl")), str(tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl.job").mkdir()
    (tmp_path / "out.jsonl.job" / folders.LOCK).write_text("9" * 20)
    with (
        open_job(file, out),
        pytest.raises(Unavailable, match=f"process {os.getpid()} works on the job"),
        open_job(file, out),
    ):
        pytest.fail("the second was let in")


@pytest.mark.parametrize("owner", [b"", b"\0\0\0", b"\xff\xfe", b"12a"])
def test_a_torn_owner_file_is_read_over(owner: bytes, tmp_path: Path) -> None:
    file, out = str(batch(tmp_path / "in.jsonl")), str(tmp_path / "out.jsonl")
    with open_job(file, out):
        (tmp_path / "out.jsonl.job" / folders.LOCK).write_bytes(owner)
        with (
            pytest.raises(Unavailable, match="process unknown works on the job"),
            open_job(file, out),
        ):
            pytest.fail("the second was let in")
    assert live(file, out, Echo())


@pytest.mark.parametrize(
    "torn", [b"", b"{", b"[]", b"{}", b'{"id": "x", "host": "h", "until": "soon"}', b"\xff"]
)
def test_a_torn_lease_is_nobodys(torn: bytes) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/jobs/torn/owner.json", torn)
    lease = Lease(fs, "/jobs/torn", lambda: 0.0, "host")
    lease.hold()
    with pytest.raises(Unavailable, match="host host works"):
        Lease(fs, "/jobs/torn", lambda: 0.0, "another").hold()
    fs.pipe_file("/jobs/torn/owner.json", torn)
    lease.release()


class Unplugged:
    """A store that cannot be reached."""

    def cat_file(self, path: str) -> bytes:
        raise TimeoutError("the store does not answer")


def test_a_store_that_is_away_ends_the_job_with_its_name_and_its_lease_by_time() -> None:
    lease = Lease(Unplugged(), "/jobs/away", lambda: LEASE_S, "host")
    with pytest.raises(Unavailable, match="the store does not answer"):
        lease.hold()
    lease.release()


@pytest.mark.parametrize("torn", [b"", b"{", b"[]", b"{}"])
def test_a_torn_description_of_a_job_is_named(
    torn: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/jobs/torn/out.jsonl.job/job.json", torn)
    with pytest.raises(InvalidRequest, match=r"out\.jsonl\.job/job\.json cannot be read"):
        live(batch(tmp_path / "in.jsonl"), "memory://jobs/torn/out.jsonl", Echo())


def test_parts_that_somebody_else_removes_are_missed(tmp_path: Path) -> None:
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
        with pytest.raises(InvalidRequest, match="answers are gone"):
            live(file, out, Meddler(act))
    assert not fs.exists(out), "it is no output while answers are missing"
    for path, data in parts.items():
        fs.pipe_file(path, data)
    assert live(file, out, Echo())
    check(fs.cat_file(out), registry.list_jobs()[0].record.id)
    fs.rm_file("/jobs/parts/out.jsonl")
    with pytest.raises(InvalidRequest, match="is gone"):
        live(file, out, Echo())


@pytest.mark.parametrize(
    "data", [b"nonsense\n", items.output_line("job", "another", Answer(200, {}))]
)
def test_parts_that_are_not_of_the_job_are_refused(data: bytes, tmp_path: Path) -> None:
    fs, file, out = (
        fsspec.filesystem("memory"),
        batch(tmp_path / "in.jsonl"),
        "memory://jobs/strange/out.jsonl",
    )
    with open_job(str(file), out):
        fs.pipe_file("/jobs/strange/out.jsonl.job/part-00000000-x", data)
    with pytest.raises(InvalidRequest, match=r"bring .* back"):
        live(file, out, Echo())


def test_an_index_of_another_version_is_not_touched(tmp_path: Path) -> None:
    file, out = batch(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    assert live(file, out, Echo())
    index = tmp_path / "out.jsonl.job" / folders.INDEX
    with open_index(index) as old:
        old._base.execute("PRAGMA user_version = 0")
    with pytest.raises(Unavailable, match="another version"):
        live(file, out, Echo())


def test_answers_to_no_item_are_kept_neither_in_part(tmp_path: Path) -> None:
    with open_job(str(batch(tmp_path / "in.jsonl")), str(tmp_path / "out.jsonl")) as job:
        index: JobIndex = job._index
        with pytest.raises(InvalidRequest, match="does not have"):
            index.save(
                [ItemResult("item-0", 200, 1), ItemResult("another", 200, 1)], OutputMark(10, "x")
            )
        assert index.mark() == OutputMark()
        assert index.totals().done == 0


def test_an_output_is_finished_only_when_all_is_answered(tmp_path: Path) -> None:
    with open_job(str(batch(tmp_path / "in.jsonl")), str(tmp_path / "out.jsonl")) as job:
        with pytest.raises(Unavailable, match="5 items have no answer"):
            job.finish()
        assert not job._index.finished()


def test_the_output_of_a_url_knows_which_job_it_is_of() -> None:
    fs = fsspec.filesystem("memory")
    assert PartsOutput(fs, "/jobs/known/out").begin("job-1", "print") == "job-1"
    assert PartsOutput(fs, "/jobs/known/out").begin("job-2", "print") == "job-1"
