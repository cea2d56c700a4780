"""Torn, foreign or shared outputs, leases and owner files are refused and left alone."""

import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import fsspec
import pytest

from actors.jobs import folders, items, registry
from actors.jobs.index import OutputMark
from actors.jobs.job import open_job
from actors.jobs.lease import LEASE_S, Lease
from actors.jobs.outputs import FileOutput
from runtime.core.errors import InvalidRequest, Unavailable
from tests.actors.jobs.changes import (
    COUNT,
    Meddler,
    appended,
    check,
)
from tests.support.jobs_harness import Echo, answers, batch, line, live

pytestmark = pytest.mark.usefixtures("small_chunks")


def test_a_users_file_in_place_of_the_output_is_not_truncated(tmp_path: Path) -> None:
    file, out = batch(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    with open_job(str(file), str(out)):
        pass  # killed before the first answer
    out.write_text("precious\n")
    with pytest.raises(InvalidRequest, match="contains more than its job has written"):
        live(file, out, Echo())
    assert out.read_text() == "precious\n"


@pytest.mark.parametrize(
    "tail", [items.LINE_PREFIX[:5], items.LINE_PREFIX + b'0", "custom', b"\0\0\0", b""]
)
def test_a_torn_last_line_is_truncated(tail: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    output = FileOutput(out)
    output.resume(OutputMark())
    mark = output.append(b"whole\n")
    appended(out, tail)
    FileOutput(out).resume(mark)
    assert out.read_bytes() == b"whole\n"


def test_two_symlinks_to_one_output_are_one_output(tmp_path: Path) -> None:
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


def test_two_jobs_on_hard_links_of_one_output_never_mix_their_answers(
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
        pytest.raises(InvalidRequest, match="changed while its job was running"),
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
def test_an_output_must_be_a_regular_file(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    match kind:
        case "folder":
            out.mkdir()
        case "pipe":
            os.mkfifo(out)
        case _:
            out.symlink_to("/dev/null")
    with pytest.raises(InvalidRequest, match="not a regular file"):
        live(batch(tmp_path / "in.jsonl"), out, Echo())


def test_an_existing_folder_keeps_its_files(tmp_path: Path) -> None:
    file, folder = tmp_path / "in.jsonl", tmp_path / "out.jsonl.job"
    file.write_text("nonsense\n")
    folder.mkdir()
    for names in ([], ["precious", "index.txt"]):
        for name in names:
            (folder / name).write_text("mine")
        with pytest.raises(InvalidRequest, match="line 1"):
            live(file, tmp_path / "out.jsonl", Echo())
        assert sorted(path.name for path in folder.iterdir()) == sorted(names)


@pytest.mark.parametrize("name", ["owner", "index.sqlite"])
@pytest.mark.parametrize("text", ["nonsense\n", line("item-0") + "\n"])
def test_a_users_file_under_the_name_of_a_jobs_own_is_left_alone(
    text: str, name: str, tmp_path: Path
) -> None:
    """Before, the owner file was overwritten, and both were deleted if the batch was refused."""
    file, folder = tmp_path / "in.jsonl", tmp_path / "out.jsonl.job"
    file.write_text(text)
    folder.mkdir()
    if name == "owner":
        (folder / name).write_text("Alice, since 1999")
    else:
        with closing(sqlite3.connect(folder / name)) as base:
            base.execute("CREATE TABLE mine (value)")
    (folder / "index.sqlite.notes").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InvalidRequest, match=f"{name} does not belong to a job"):
        live(file, tmp_path / "out.jsonl", Echo())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not (tmp_path / "out.jsonl").exists()


def test_a_refused_batch_deletes_the_files_of_its_index_and_no_others(tmp_path: Path) -> None:
    file, folder = tmp_path / "in.jsonl", tmp_path / "out.jsonl.job"
    file.write_text("nonsense\n")
    folder.mkdir()
    (folder / "index.sqlite.notes").write_text("mine")
    with pytest.raises(InvalidRequest, match="line 1"):
        live(file, tmp_path / "out.jsonl", Echo())
    assert [path.name for path in folder.iterdir()] == ["index.sqlite.notes"]


def test_a_killed_first_start_can_be_repeated(tmp_path: Path) -> None:
    """It leaves a database without tables, and a lock file that may be torn."""
    file, folder = batch(tmp_path / "in.jsonl"), tmp_path / "out.jsonl.job"
    for torn in (b"", b"\0\0\0", b"123\0"):
        folder.mkdir(exist_ok=True)
        (folder / folders.LOCK).write_bytes(torn)
        folders.delete_index(folder)
        (folder / folders.INDEX).touch()
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        assert live(file, tmp_path / "out.jsonl", Echo())


def test_the_error_names_the_current_owner_of_a_job(tmp_path: Path) -> None:
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
def test_a_torn_owner_file_is_ignored(owner: bytes, tmp_path: Path) -> None:
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
def test_a_torn_lease_has_no_owner(torn: bytes) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/jobs/torn/owner.json", torn)
    lease = Lease(fs, "/jobs/torn", lambda: 0.0, "host")
    lease.hold()
    with pytest.raises(Unavailable, match="host host works"):
        Lease(fs, "/jobs/torn", lambda: 0.0, "another").hold()
    fs.pipe_file("/jobs/torn/owner.json", torn)
    lease.release()


class Unplugged:
    """Is a store that cannot be reached."""

    def cat_file(self, path: str) -> bytes:
        raise TimeoutError("the store does not answer")


def test_an_unreachable_store_ends_the_job_and_the_lease_expires() -> None:
    lease = Lease(Unplugged(), "/jobs/away", lambda: LEASE_S, "host")
    with pytest.raises(Unavailable, match="the store does not answer"):
        lease.hold()
    lease.release()


@pytest.mark.parametrize("torn", [b"", b"{", b"[]", b"{}"])
def test_a_torn_job_description_is_named(
    torn: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/jobs/torn/out.jsonl.job/job.json", torn)
    with pytest.raises(InvalidRequest, match=r"cannot read .*out\.jsonl\.job/job\.json"):
        live(batch(tmp_path / "in.jsonl"), "memory://jobs/torn/out.jsonl", Echo())
