"""Helpers of the job tests: batch files, an answerer, and kills at any store operation."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from actors.jobs.index import JobIndex, OutputMark
from actors.jobs.items import Answer, Item
from actors.jobs.job import open_job
from actors.jobs.outputs import Output
from actors.jobs.worker import answer_job


def line(name: str, **body: Any) -> str:
    return json.dumps(
        {
            "custom_id": name,
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "m", "prompt": name} | body,
        }
    )


def batch(path: Path, count: int = 5) -> Path:
    path.write_text("".join(line(f"item-{number}") + "\n" for number in range(count)))
    return path


class Echo:
    """Answers with prompt and seed after one turn of the loop; `asked` counts by custom_id.

    A longer `request_id` gives longer lines, so the rest of a torn one shows after a shorter one.
    """

    def __init__(self, request_id: str = "") -> None:
        self.request_id = request_id
        self.asked: Counter[str] = Counter()
        self.flying = self.most = 0

    async def answer(self, item: Item) -> Answer:
        self.asked[item.custom_id] += 1
        self.flying += 1
        self.most = max(self.most, self.flying)
        try:
            await asyncio.sleep(0)
        finally:
            self.flying -= 1
        return Answer(200, said(item.body["prompt"], item.body["seed"]), self.request_id)


def said(prompt: str, seed: int) -> dict[str, Any]:
    return {
        "choices": [{"text": f"{prompt} {seed}"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4},
    }


def answers(data: bytes) -> dict[str, dict[str, Any]]:
    """Lines of an output by custom_id; fails where one stands twice or is torn."""
    assert data.endswith(b"\n")
    found = [json.loads(text) for text in data.splitlines()]
    names = Counter(one["custom_id"] for one in found)
    assert max(names.values()) == 1, names
    return {one["custom_id"]: one for one in found}


class Killed(BaseException):
    """The process is gone: nothing that it does from now on has an effect."""


class Doom:
    """Kills at the `last`th point; 0: never. `points` counts those that were passed."""

    def __init__(self, last: int = 0) -> None:
        self.last, self.points = last, 0

    def point(self) -> None:
        if self.last and self.points + 1 >= self.last:
            raise Killed
        self.points += 1


class DoomedOutput:
    """Killed before, in and after each operation; in `append`, after any part of what it writes."""

    def __init__(self, inner: Output, doom: Doom) -> None:
        self.inner, self.doom = inner, doom

    def begin(self, job: str, fingerprint: str) -> str:
        self.doom.point()
        found = self.inner.begin(job, fingerprint)
        self.doom.point()
        return found

    def resume(self, mark: OutputMark) -> list[bytes]:
        self.doom.point()
        found = self.inner.resume(mark)
        self.doom.point()
        return found

    def append(self, lines: bytes) -> OutputMark:
        for written in (0, 1, len(lines) // 2, len(lines) - 1):
            try:
                self.doom.point()
            except Killed:
                self.inner.append(lines[:written])
                raise
        found = self.inner.append(lines)
        self.doom.point()
        return found

    def finish(self) -> None:
        self.doom.point()
        self.inner.finish()
        self.doom.point()


class DoomedIndex(JobIndex):
    """Killed before, in and after each transaction."""

    doom: Doom

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self.doom.point()
        with super()._transaction():
            yield
            self.doom.point()
        self.doom.point()


class DoomedFiles:
    """An fsspec filesystem whose process is killed before or after any operation."""

    def __init__(self, inner: Any, doom: Doom) -> None:
        self.inner, self.doom = inner, doom

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self.inner, name)

        def doomed(*arguments: Any, **more: Any) -> Any:
            self.doom.point()
            found = operation(*arguments, **more)
            self.doom.point()
            return found

        return doomed


def live(file: Path | str, out: Path | str, answerer: Any, most: int = 2) -> bool:
    """One life of a job, to its end."""
    with open_job(str(file), str(out)) as job:
        return asyncio.run(answer_job(job, answerer, most, lambda totals: None))
