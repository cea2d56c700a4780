"""One job, claimed by this process: what is left to ask, and a place for the answers that no kill can tear."""

import json
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from actors.jobs import folders, items, source
from actors.jobs.index import Index, Kept, Record
from actors.jobs.items import Answer, Item, Misfit
from actors.jobs.lease import Lease
from actors.jobs.outputs import Output, destination
from runtime.errors import InvalidRequest, OutriderError


@dataclass(frozen=True, slots=True)
class Answered:
    """`attempts`: how often it was asked in this life of the job."""

    item: Item | Misfit
    answer: Answer
    attempts: int = 1


class Job:
    """Made by `opened`. An answer counts from the return of `keep`: it stands in the output once then, whatever happens after."""

    def __init__(self, record: Record, file: str, index: Index, output: Output, lease: Lease | None) -> None:
        self.record, self.totals = record, index.totals()
        self._file, self._index, self._output, self._lease = file, index, output, lease

    def left(self) -> Iterator[Item | Misfit]:
        """The items without an answer, in the order of the file, read as they are taken."""
        wanted = set(self._index.unanswered())
        for line, raw in source.lines(self._file):
            if line in wanted:
                yield items.read(line, raw, self.record.id)

    def keep(self, answered: Sequence[Answered]) -> None:
        lines = [items.output_line(self.record.id, one.item.custom_id, one.answer) for one in answered]
        position = self._output.append(b"".join(lines))
        self._index.keep(
            [Kept(one.item.custom_id, one.answer.status, one.answer.tokens, one.attempts, position) for one in answered], position
        )
        self.totals = self.totals.plus([one.answer for one in answered])

    def wanted(self) -> bool:
        """False where somebody has cancelled the job. To be asked every few seconds: it renews the claim.

        Raises Unavailable where another machine has taken the job over.
        """
        if self._lease is not None:
            self._lease.hold()
        return not self._index.cancelled()

    def finish(self) -> None:
        """To be called when nothing is left: the output is whole when this returns."""
        self._output.finish()
        self._index.finish()


@contextmanager
def opened(file: str, out: str) -> Iterator[Job]:
    """The job that answers `file` into `out`: begun, or taken up where it was left.

    Raises InvalidRequest, before anything is asked, for a file that cannot be read, a line that has no name of its own, an output that
    belongs to something else; Unavailable where another process works on the job.
    """
    file, out = absolute(file), absolute(out)
    output, local, lease = destination(out)
    digest = source.fingerprint(file)
    folder = folders.state_of(out, local)
    with folders.claimed(folder), closing(Index(folder / folders.INDEX)) as index:
        record = index.record()
        if record is None:
            record = _begun(index, output, Record("", file, out, digest, time.time()), folder)
        if record.fingerprint != digest:
            raise InvalidRequest(
                f"{out} is the output of a job on another file, or {file} has changed since: give another -o, "
                f"or delete it and {folder} to begin anew",
                "o",
            )
        folders.enter(folder)
        index.cancel(False)
        with _held(lease):
            if not index.finished():
                _resume(index, output)
            yield Job(record, file, index, output, lease)


@contextmanager
def _held(lease: Lease | None) -> Iterator[None]:
    if lease is None:
        yield
    else:
        lease.hold()
        try:
            yield
        finally:
            lease.release()


def absolute(url: str) -> str:
    """As it is called from anywhere on this machine."""
    return url if "://" in url or "::" in url else str(Path(url).absolute())


def _begun(index: Index, output: Output, record: Record, folder: Path) -> Record:
    """All lines are in the index and the output is taken, or no trace is left."""
    try:
        with index.creating():
            for line, raw in source.lines(record.source):
                index.add(line, items.custom_id(line, raw))
            job = output.begin(f"job-{uuid.uuid4().hex[:10]}", record.fingerprint)
            return index.name(replace(record, id=job))
    except OutriderError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _resume(index: Index, output: Output) -> None:
    position = index.position()
    known = [json.loads(line) for line in output.resume(position)]
    if known:
        answers = [(line["custom_id"], Answer(line["response"]["status_code"], line["response"]["body"])) for line in known]
        index.keep([Kept(name, answer.status, answer.tokens, 0, position) for name, answer in answers], position)
