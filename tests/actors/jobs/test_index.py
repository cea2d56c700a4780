"""The index of a job reads its items a page at a time and counts what they come to."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import fsspec
import pytest

from actors.jobs import index as module
from actors.jobs.index import FAILED, PAGE, Index, Kept, Mark, Record, Totals, reading
from actors.jobs.outputs import PartsOutput
from runtime.core.errors import InvalidRequest


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    """Seven items on every second line, none of them answered."""
    with reading(tmp_path / "index.sqlite") as found:
        with found.creating():
            for line in range(14, 0, -2):
                found.add(line, f"item-{line}", b"digest")
            found.name(Record("job", "in", "out", "print", 0.0))
        yield found


def lines(index: Index) -> list[int]:
    """Those of the items without an answer; no more than 20, should they never end."""
    return [line for line, _ in islice(index.unanswered(), 20)]


@pytest.mark.parametrize("page", [1, 2, 7, 8, PAGE])
def test_every_item_without_an_answer_is_read_once_whatever_the_page(
    page: int, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAGE", page)
    assert lines(index) == [2, 4, 6, 8, 10, 12, 14]
    index.keep([Kept("item-6", 200, 1)], Mark(1))
    assert lines(index) == [2, 4, 8, 10, 12, 14]


@pytest.mark.parametrize("page", [1, 2, PAGE])
def test_answers_may_be_kept_while_the_items_are_read(
    page: int, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAGE", page)
    read: list[int] = []
    for line, _ in index.unanswered():
        read.append(line)
        index.keep([Kept(f"item-{line}", 200, 1)], Mark(line))
    assert read == [2, 4, 6, 8, 10, 12, 14]
    assert lines(index) == []


def test_an_answer_is_a_failure_from_status_400_on(index: Index) -> None:
    for number, status in enumerate((200, FAILED - 1, FAILED, FAILED + 1), 1):
        index.keep([Kept(f"item-{2 * number}", status, 10)], Mark(number))
    assert index.totals() == Totals(7, 4, 2, 40)


def test_parts_of_a_job_on_another_file_are_refused_without_an_index_too() -> None:
    fs = fsspec.filesystem("memory")
    PartsOutput(fs, "/index/out").begin("job-1", "print")
    with pytest.raises(InvalidRequest, match="another file"):
        PartsOutput(fs, "/index/out").begin("job-2", "another print")
    fs.rm("/index", recursive=True)
