"""Lists and cancels the batch jobs of this user on this machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from actors.jobs import folders
from actors.jobs.index import JobRecord, Totals, open_index
from runtime.core.errors import InvalidRequest, Unavailable

JobState = Literal["running", "finished", "cancelled", "stopped"]


@dataclass(frozen=True, slots=True)
class JobStatus:
    """The status of a job. A `stopped` job was interrupted; submitting it again resumes it."""

    file: Path
    record: JobRecord
    state: JobState
    totals: Totals


def list_jobs() -> list[JobStatus]:
    """Returns all jobs, the oldest first, without those whose folder cannot be read."""
    found: list[JobStatus] = []
    for file in folders.list_index_files():
        try:
            one = read_status(file)
        except Unavailable:
            continue
        if one is not None:
            found.append(one)
    return sorted(found, key=lambda one: one.record.created)


def find_job(name: str) -> JobStatus:
    """Returns the job with this ID. Raises InvalidRequest if there is none."""
    for one in list_jobs():
        if one.record.id == name:
            return one
    raise InvalidRequest(f"unknown job {name}: see `outrider jobs`", "job")


def read_status(file: Path) -> JobStatus | None:
    """Returns the status in an index file; None if no job was started there."""
    with open_index(file) as index:
        record = index.record()
        if record is None:
            return None
        if index.finished():
            state: JobState = "finished"
        elif folders.is_locked(file.parent):
            state = "running"
        else:
            state = "cancelled" if index.cancelled() else "stopped"
        return JobStatus(file, record, state, index.totals())


def cancel_job(name: str) -> JobStatus:
    """Asks the process that works on a job to stop, which takes about a second.

    Raises InvalidRequest if the job is unknown or finished.
    """
    one = find_job(name)
    if one.state == "finished":
        raise InvalidRequest(f"{name} is finished: there is nothing to cancel", "job")
    with open_index(one.file) as index:
        index.cancel()
    return one
