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
from actors.jobs.outputs import PartsOutput
from runtime.core.errors import InvalidRequest


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
