"""One job, claimed by this process: what is left to ask, and a place for the answers that no kill can tear."""

import hashlib
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from actors.jobs import folders, items, source
from actors.jobs.index import ItemResult, JobIndex, JobRecord, Totals
from actors.jobs.items import Answer, InvalidItem, Item
from actors.jobs.lease import Lease
from actors.jobs.outputs import Output, resolve_output
from runtime.core.errors import InvalidRequest, OutriderError, Unavailable

CONTENT_CHANGED = "its content is not what it was"


@dataclass(frozen=True, slots=True)
class AnsweredItem:
    """An item and what came of it."""

    item: Item | InvalidItem
    answer: Answer


class Job:
    """Made by `opened`. An answer counts from the return of `keep`: it stands in the output once then, whatever happens after."""

    def __init__(
        self, record: JobRecord, file: str, index: JobIndex, output: Output, lease: Lease | None
    ) -> None:
        self.record, self.totals = record, index.totals()
        self._file, self._index, self._output, self._lease = file, index, output, lease
        self._difference = (
            ""  # between the file and what it was when the job began, found by `remaining`
        )

    def remaining(self) -> Iterator[Item | InvalidItem]:
        """The items without an answer, in the order of the file, read as they are taken.

        It ends at a line that is not what it was when the job began; `finish` raises then.
        """
        given = source.read_lines(self._file)
        for line, digest in self._index.unanswered():
            try:
                raw = next((raw for number, raw in given if number >= line), b"")
            except InvalidRequest as error:
                self._difference = str(error)
                return
            if items.line_digest(raw) != digest:
                self._difference = (
                    f"line {line} is not what it was" if raw else f"line {line} is gone"
                )
                return
            yield items.parse_item(line, raw, self.record.id)

    def save(self, answered: Sequence[AnsweredItem]) -> None:
        lines = [
            items.output_line(self.record.id, one.item.custom_id, one.answer) for one in answered
        ]
        mark = self._output.append(b"".join(lines))
        self._index.save(
            [
                ItemResult(one.item.custom_id, one.answer.status, one.answer.tokens)
                for one in answered
            ],
            mark,
        )
        self.totals = self.totals.plus([one.answer for one in answered])

    def renew(self) -> bool:
        """False where somebody has cancelled the job. To be asked every few seconds: it renews the claim.

        Raises Unavailable where another machine has taken the job over.
        """
        if self._lease is not None:
            self._lease.hold()
        return not self._index.cancelled()

    def finish(self) -> None:
        """To be called when nothing is left: the output is whole when this returns.

        Raises InvalidRequest where the file or the output has changed since the job began, Unavailable where an item has no answer.
        What was answered is kept, and the job can be taken up again when the file is back.
        """
        totals = self._index.totals()
        if found := self._difference or source_difference(self._file, self.record.fingerprint):
            raise source_changed(self._file, self.record.output, totals, found)
        if totals.done < totals.items:
            raise Unavailable(
                f"{totals.items - totals.done} items have no answer: run the same command again"
            )
        self._output.finish()
        self._index.finish()


def source_difference(file: str, fingerprint: str) -> str:
    """Between the file and the one with this fingerprint; "" where there is none."""
    try:
        return "" if source.fingerprint(file) == fingerprint else CONTENT_CHANGED
    except InvalidRequest:
        return "it is gone, or cannot be read"


def source_changed(file: str, out: str, totals: Totals, how: str) -> InvalidRequest:
    return InvalidRequest(
        f"{file} has changed since its job began ({how}); {totals.done} of {totals.items} items are answered in {out}: bring the file back "
        "and run the same command to go on, or give another -o",
        "file",
    )


@contextmanager
def open_job(file: str, out: str) -> Iterator[Job]:
    """The job that answers `file` into `out`: begun, or taken up where it was left.

    Raises InvalidRequest, before anything is asked, for a file that cannot be read, a line that has no name of its own, an output that
    belongs to something else; Unavailable where another process works on the job.
    """
    file, out = absolute_url(file), absolute_url(out)
    output, local, lease = resolve_output(out)
    digest = source.fingerprint(file)
    folder = folders.state_folder(out, local)
    with folders.lock_job(folder), closing(JobIndex(folder / folders.INDEX)) as index:
        record = index.record()
        if record is None:
            record = _begin(index, output, JobRecord("", file, out, digest, time.time()), folder)
        if record.fingerprint != digest and record.source == file:
            raise source_changed(file, out, index.totals(), CONTENT_CHANGED)
        if record.fingerprint != digest:
            raise InvalidRequest(
                f"{out} is the output of a job on another file, {record.source}: give another -o, or delete it and {folder} to begin anew",
                "o",
            )
        folders.register_job(folder)
        index.cancel(False)
        with _lease_held(lease):
            if not index.finished():
                _resume(index, output)
            yield Job(record, file, index, output, lease)


@contextmanager
def _lease_held(lease: Lease | None) -> Iterator[None]:
    if lease is None:
        yield
    else:
        lease.hold()
        try:
            yield
        finally:
            lease.release()


def absolute_url(url: str) -> str:
    """As it is called from anywhere on this machine."""
    return url if "://" in url or "::" in url else str(Path(url).absolute())


def _begin(index: JobIndex, output: Output, record: JobRecord, folder: Path) -> JobRecord:
    """All lines are in the index and the output is taken, or no trace is left."""
    digest = hashlib.sha256()
    try:
        with index.creating():
            for line, raw in source.read_lines(record.source, digest.update):
                index.add(line, items.parse_custom_id(line, raw), items.line_digest(raw))
            if digest.hexdigest() != record.fingerprint:
                raise InvalidRequest(
                    f"{record.source} has changed while it was read: give a file that stays as it is",
                    "file",
                )
            job = output.begin(f"job-{uuid.uuid4().hex[:10]}", record.fingerprint)
            return index.name(replace(record, id=job))
    except OutriderError:
        folders.delete_index(folder)
        raise


def _resume(index: JobIndex, output: Output) -> None:
    mark = index.mark()
    known = [items.parse_output_line(line) for line in output.resume(mark)]
    if known:
        index.save([ItemResult(name, answer.status, answer.tokens) for name, answer in known], mark)
