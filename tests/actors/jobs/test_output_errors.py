"""What an output is found to be instead, with the way out, and what it is when it is whole."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from actors.jobs import outputs
from actors.jobs.index import OutputMark
from actors.jobs.items import Answer, output_line
from actors.jobs.outputs import FileOutput, PartsOutput
from runtime.core.errors import InvalidRequest, Unavailable

ONE, TWO = (output_line("job", name, Answer(200, {})) for name in ("one", "two"))
OVER = "restore it and run the same command again, or delete it and {0}.job to start over"


def begun(path: Path, *written: bytes) -> FileOutput:
    output = FileOutput(path)
    assert output.begin("job", "print") == "job"
    assert output.resume(OutputMark()) == []
    for lines in written:
        output.append(lines)
    return output


def mark(content: bytes) -> OutputMark:
    return OutputMark(len(content), hashlib.sha256(content).hexdigest())


def refusal(act: Callable[[], object], kind: type[Exception] = InvalidRequest) -> str:
    with pytest.raises(kind) as refused:
        act()
    if isinstance(refused.value, InvalidRequest):
        assert refused.value.param == "o"
    return str(refused.value)


def test_a_file_of_something_else_is_not_begun(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.touch()
    begun(path)  # empty as it is, it may be anybody's
    path.write_text("x")
    said = refusal(lambda: FileOutput(path).begin("job", "print"))
    way = "exists and is not the output of a job on this file: give another -o, or delete it"
    assert said == f"{path} {way}"


def test_a_file_goes_on_where_its_mark_is(tmp_path: Path) -> None:
    path = tmp_path / "out"
    assert begun(path).append(ONE) == mark(ONE)
    path.write_bytes(ONE + TWO[:-5])  # torn
    again = FileOutput(path)
    assert again.resume(mark(ONE)) == []
    assert path.read_bytes() == ONE
    assert again.append(TWO) == mark(ONE + TWO)
    again.finish()
    again.finish()
    assert path.read_bytes() == ONE + TWO
    path.write_bytes(ONE + b"\0" * 400)  # after a power loss
    FileOutput(path).resume(mark(ONE))
    assert path.read_bytes() == ONE


def test_a_file_that_is_not_as_its_job_left_it_is_not_resumed(tmp_path: Path) -> None:
    path = tmp_path / "out"
    over = OVER.format(path)
    said = refusal(lambda: FileOutput(path).resume(mark(ONE)))
    assert said == f"{path} is missing: {over}"
    assert not path.exists()
    for content in (TWO, ONE[:-1]):
        path.write_bytes(content)
        said = refusal(lambda: FileOutput(path).resume(mark(ONE)))
        assert said == f"{path} is not as its job left it: {over}"
        assert path.read_bytes() == content
    path.write_bytes(ONE + b"mine\n")
    said = refusal(lambda: FileOutput(path).resume(mark(ONE)))
    assert said == f"{path} contains more than its job has written: {over}"
    path.unlink()
    path.mkdir()
    said = refusal(lambda: FileOutput(path).resume(OutputMark()))
    assert said == f"cannot write {path} (Is a directory): give another -o"


def test_a_file_that_changes_under_its_job_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "out"
    changed = f"{path} was changed while its job was running: {OVER.format(path)}"
    output = begun(path, ONE)
    path.write_bytes(ONE + b"x")
    assert refusal(lambda: output.append(TWO)) == changed
    assert refusal(output.finish) == changed
    path.write_bytes(ONE)
    output.append(TWO)
    path.write_bytes(TWO + ONE)  # of the same size
    assert refusal(output.finish) == changed
    path.rename(tmp_path / "moved")
    path.write_bytes(ONE + TWO)
    assert refusal(lambda: output.append(TWO)) == changed  # another file of the same content
    path.unlink()
    assert refusal(output.finish) == f"{path} is missing: {OVER.format(path)}"
    said = refusal(lambda: output.append(TWO), Unavailable)
    way = "(No such file or directory): fix it and run the same command again"
    assert said == f"cannot write {path} {way}"
    path.mkdir()
    said = refusal(output.finish, Unavailable)
    assert said == f"cannot read {path} (Is a directory): fix it and run the same command again"
    never = FileOutput(tmp_path / "moved")
    assert "was changed while" in refusal(lambda: never.append(TWO))


def parts(name: str) -> tuple[PartsOutput, str]:
    return PartsOutput(fsspec.filesystem("memory"), f"/errors/{name}"), f"/errors/{name}"


def files(path: str) -> list[str]:
    return sorted(fsspec.filesystem("memory").find(path))


def test_parts_are_joined_in_order_each_item_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "PARTS_PER_FETCH", 2)
    output, path = parts("joined")
    assert output.begin("job", "print") == "job"
    assert output.resume(OutputMark()) == []
    lines = [output_line("job", f"item-{number}", Answer(200, {})) for number in range(5)]
    for number, line in enumerate(lines, 1):
        assert output.append(line) == OutputMark(number)
    other, _ = parts("joined")  # on another machine
    assert other.begin("another", "print") == "job"
    assert other.resume(OutputMark(3)) == lines
    assert other.resume(OutputMark(5)) == []
    assert other.append(lines[0] + TWO) == OutputMark(6)
    output.finish()
    whole = b"".join([*lines, TWO])
    assert fsspec.filesystem("memory").cat_file(path) == whole
    assert files(path + ".job") == [f"{path}.job/job.json"]
    assert json.loads(fsspec.filesystem("memory").cat_file(f"{path}.job/job.json")) == {
        "id": "job",
        "fingerprint": "print",
        "whole": True,
    }
    output.finish()
    assert other.resume(OutputMark(6)) == [*lines, TWO]
    assert fsspec.filesystem("memory").cat_file(path) == whole


def test_what_is_no_output_of_this_job_is_refused_by_its_address() -> None:
    fs = fsspec.filesystem("memory")
    output, path = parts("taken")
    fs.pipe_file(path, b"mine")
    way = "give another -o, or delete"
    assert refusal(lambda: output.begin("job", "print")) == (
        f"{path} exists and is not the output of a job on this file: {way} it"
    )
    fs.rm_file(path)
    output.begin("job", "print")
    assert refusal(lambda: parts("taken")[0].begin("job", "other")) == (
        f"{path} is the output of a job on another file: {way} {path}.job"
    )
    missing = f"answers are missing from {path}.job: restore them, or delete it to start over"
    assert refusal(lambda: output.resume(OutputMark(1))) == missing
    output.resume(OutputMark())
    output.append(ONE)
    fs.rm_file(next(file for file in files(path + ".job") if "part-" in file))
    assert refusal(output.finish) == missing
    output, _ = parts("taken")
    assert output.resume(OutputMark()) == []
    output.append(ONE + TWO)
    output.finish()
    fs.rm_file(path)
    assert refusal(output.finish) == (
        f"{path} is missing: restore it, or delete {path}.job to start over"
    )
    for torn in (b"{", b"[]", b'{"id": 1, "whole": false}'):
        fs.pipe_file(f"{path}.job/job.json", torn)
        assert refusal(output.finish) == (
            f"cannot read {path}.job/job.json: restore it, or delete {path}.job to start over"
        )
    fs.rm_file(f"{path}.job/job.json")
    assert refusal(output.finish) == (
        f"{path}.job/job.json is missing: restore it, or give another -o"
    )
