"""One job, locked by this process: its remaining items, and its answers so far."""

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

CONTENT_CHANGED = "its content differs"


@dataclass(frozen=True, slots=True)
class AnsweredItem:
    """An item and its answer."""

    item: Item | InvalidItem
    answer: Answer


class Job:
    """Created by `open_job`.

    Once `save` returns, an answer is in the output exactly once, whatever happens afterwards.
    """

    def __init__(
        self, record: JobRecord, file: str, index: JobIndex, output: Output, lease: Lease | None
    ) -> None:
        self.record, self.totals = record, index.totals()
        self._file, self._index, self._output, self._lease = file, index, output, lease
        self._difference = ""  # of the file since the job started, found by `remaining`

    def remaining(self) -> Iterator[Item | InvalidItem]:
        """Yields the items without an answer, in order; the file is read as they are taken.

        Stops at a line that has changed since the job started; `finish` then raises.
        """
        given = source.read_lines(self._file)
        for line, digest in self._index.unanswered():
            try:
                raw = next((raw for number, raw in given if number >= line), b"")
            except InvalidRequest as error:
                self._difference = str(error)
                return
            if items.line_digest(raw) != digest:
                self._difference = f"line {line} differs" if raw else f"line {line} is missing"
                return
            yield items.parse_item(line, raw, self.record.id)

    def save(self, answered: Sequence[AnsweredItem]) -> None:
        """Appends the answers to the output and records them."""
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
        """Renews the lease, and returns False if the job was cancelled. Call it every few seconds.

        Raises Unavailable if another machine has taken the job over.
        """
        if self._lease is not None:
            self._lease.hold()
        return not self._index.cancelled()

    def finish(self) -> None:
        """Completes the output. Call it when no item is left.

        Raises InvalidRequest if the file or the output has changed since the job started, and
        Unavailable if an item has no answer. The answers are kept, and the job can be resumed once
        the file is restored.
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
    """Returns how the file differs from the one with this fingerprint, "" if it does not."""
    try:
        return "" if source.fingerprint(file) == fingerprint else CONTENT_CHANGED
    except InvalidRequest:
        return "it is missing or unreadable"


def source_changed(file: str, out: str, totals: Totals, how: str) -> InvalidRequest:
    return InvalidRequest(
        f"{file} has changed since its job started ({how}); {totals.done} of {totals.items} items "
        "are "
        f"answered in {out}: restore the file and run the same command to resume, or give another "
        "-o",
        "file",
    )


@contextmanager
def open_job(file: str, out: str) -> Iterator[Job]:
    """Yields the job that answers `file` into `out`, new or resumed.

    Raises InvalidRequest, before anything is asked, if the file is unreadable, a line has no unique
    custom_id, or the output belongs to something else. Raises Unavailable if another process works
    on the job.
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
                f"{out} is the output of a job on another file, {record.source}: give another -o, "
                f"or delete it and {folder} to start over",
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
    """Returns a path as absolute, and a URL unchanged."""
    return url if "://" in url or "::" in url else str(Path(url).absolute())


def _begin(index: JobIndex, output: Output, record: JobRecord, folder: Path) -> JobRecord:
    """Adds all lines to the index and claims the output, or leaves no trace."""
    digest = hashlib.sha256()
    try:
        with index.creating():
            for line, raw in source.read_lines(record.source, digest.update):
                index.add(line, items.parse_custom_id(line, raw), items.line_digest(raw))
            if digest.hexdigest() != record.fingerprint:
                raise InvalidRequest(
                    f"{record.source} changed while it was read: give a file that does not change",
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
