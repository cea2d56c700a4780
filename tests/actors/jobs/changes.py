"""Changes the files of a job as somebody else would."""

from collections.abc import Callable
from pathlib import Path

from actors.jobs import items
from actors.jobs.items import Answer, Item
from tests.support.jobs_harness import Echo, answers, said

COUNT = 200  # items, more than a job reads ahead
Change = Callable[[Path], object]


class Meddler(Echo):
    """Calls `act` when the `when`th item is asked for."""

    def __init__(self, act: Callable[[], object], when: int = 5) -> None:
        super().__init__()
        self.act, self.when = act, when

    async def answer(self, item: Item) -> Answer:
        if self.asked.total() == self.when:
            self.act()
        return await super().answer(item)


def in_place(file: Path, old: bytes, new: bytes) -> None:
    """Overwrites bytes; file and size stay the same."""
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


def check(out: bytes, job: str) -> None:
    """Asserts that each item has its own answer, once."""
    found = answers(out)
    assert found.keys() == {f"item-{number}" for number in range(COUNT)}
    for name, one in found.items():
        assert one["response"]["body"] == said(name, items.item_seed(job, name))


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
