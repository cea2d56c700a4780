"""The index of a job reads its items a page at a time and counts what they come to."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import fsspec
import pytest

from actors.jobs import index as module
from actors.jobs.index import (
    MIN_ERROR_STATUS,
    PAGE_SIZE,
    ItemResult,
    JobIndex,
    JobRecord,
    OutputMark,
    Totals,
    open_index,
)
from actors.jobs.items import Answer
from actors.jobs.outputs import PartsOutput
from runtime.core.errors import InvalidRequest, Unavailable


@pytest.fixture
def index(tmp_path: Path) -> Iterator[JobIndex]:
    """Seven items on every second line, none of them answered."""
    with open_index(tmp_path / "index.sqlite") as found:
        with found.creating():
            for line in range(14, 0, -2):
                found.add(line, f"item-{line}", b"digest")
            found.name(JobRecord("job", "in", "out", "print", 0.0))
        yield found


def lines(index: JobIndex) -> list[int]:
    """Those of the items without an answer; no more than 20, should they never end."""
    return [line for line, _ in islice(index.unanswered(), 20)]


@pytest.mark.parametrize("page", [1, 2, 7, 8, PAGE_SIZE])
def test_every_item_without_an_answer_is_read_once_whatever_the_page(
    page: int, index: JobIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAGE_SIZE", page)
    assert lines(index) == [2, 4, 6, 8, 10, 12, 14]
    index.save([ItemResult("item-6", 200, 1)], OutputMark(1))
    assert lines(index) == [2, 4, 8, 10, 12, 14]


@pytest.mark.parametrize("page", [1, 2, PAGE_SIZE])
def test_answers_may_be_kept_while_the_items_are_read(
    page: int, index: JobIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAGE_SIZE", page)
    read: list[int] = []
    for line, _ in index.unanswered():
        read.append(line)
        index.save([ItemResult(f"item-{line}", 200, 1)], OutputMark(line))
    assert read == [2, 4, 6, 8, 10, 12, 14]
    assert lines(index) == []


def test_an_answer_is_a_failure_from_status_400_on(index: JobIndex) -> None:
    for number, status in enumerate(
        (200, MIN_ERROR_STATUS - 1, MIN_ERROR_STATUS, MIN_ERROR_STATUS + 1), 1
    ):
        index.save([ItemResult(f"item-{2 * number}", status, 10)], OutputMark(number))
    assert index.totals() == Totals(7, 4, 2, 40)


def test_parts_of_a_job_on_another_file_are_refused_without_an_index_too() -> None:
    fs = fsspec.filesystem("memory")
    PartsOutput(fs, "/index/out").begin("job-1", "print")
    with pytest.raises(InvalidRequest, match="another file"):
        PartsOutput(fs, "/index/out").begin("job-2", "another print")
    fs.rm("/index", recursive=True)


def test_a_job_is_found_again_as_it_was_recorded(tmp_path: Path) -> None:
    file = tmp_path / "index.sqlite"
    record = JobRecord("job", "in.jsonl", "out.jsonl", "print", 1234.5)
    with open_index(file) as index:
        assert index.record() is None
        with index.creating():
            index.add(7, "a", b"digest")
            assert index.name(record) == record
    with open_index(file) as index:
        assert index.record() == record
        assert index.mark() == OutputMark(0, "")
        assert index.totals() == Totals(1, 0, 0, 0)
        assert list(index.unanswered()) == [(7, b"digest")]
        assert (index.finished(), index.cancelled()) == (False, False)
        index.save([ItemResult("a", 200, 5)], OutputMark(9, "abc"))
        index.cancel()
        index.finish()
    with open_index(file) as index:
        assert index.mark() == OutputMark(9, "abc")
        assert index.totals() == Totals(1, 1, 0, 5)
        assert (index.finished(), index.cancelled()) == (True, True)
        index.cancel(False)
        assert (index.finished(), index.cancelled()) == (True, False)


def add_twice(index: JobIndex) -> None:
    for line in (1, 3):
        index.add(line, "a", b"digest")


def test_what_cannot_be_recorded_is_named_and_leaves_the_index_empty(tmp_path: Path) -> None:
    with open_index(tmp_path / "index.sqlite") as index:
        with pytest.raises(InvalidRequest) as refused, index.creating():
            add_twice(index)
        said = "line 3 has the custom_id of line 1, 'a': make each unique"
        assert (str(refused.value), refused.value.param) == (said, "custom_id")
        assert index.record() is None
        with pytest.raises(InvalidRequest) as refused, index.creating():
            index.name(JobRecord("job", "in.jsonl", "out", "print", 0.0))
        said = "in.jsonl has no items: give at least one line"
        assert (str(refused.value), refused.value.param) == (said, "file")
        assert index.record() is None


def test_answers_to_unknown_items_name_the_output_and_change_nothing(index: JobIndex) -> None:
    with pytest.raises(InvalidRequest) as refused:
        index.save([ItemResult("item-2", 200, 1), ItemResult("none", 200, 1)], OutputMark(5))
    said = "the output has answers to unknown items: restore it as the job left it"
    assert (str(refused.value), refused.value.param) == (said, "o")
    assert index.totals() == Totals(7, 0, 0, 0)
    assert index.mark() == OutputMark()


def test_totals_count_answers_errors_and_tokens() -> None:
    usage = {"usage": {"completion_tokens": 4}}
    answers = [Answer(200, usage), Answer(399, usage), Answer(400, {}), Answer(500, {})]
    assert Totals(9, 2, 1, 10).plus(answers) == Totals(9, 6, 3, 18)


def test_a_state_that_cannot_be_used_names_its_file(tmp_path: Path) -> None:
    file = tmp_path / "index.sqlite"
    file.write_bytes(b"nonsense" * 200)
    with pytest.raises(
        Unavailable, match=r"cannot use the job state in .*index\.sqlite \(.*\): fr"
    ):
        JobIndex(file)
