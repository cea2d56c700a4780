"""The jobs of this user on this machine, as they are now."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from actors.jobs import folders
from actors.jobs.index import JobRecord, Totals, open_index
from runtime.core.errors import InvalidRequest, Unavailable

JobState = Literal["running", "finished", "cancelled", "stopped"]


@dataclass(frozen=True, slots=True)
class JobStatus:
    """`stopped`: it was interrupted, and goes on when it is submitted again."""

    file: Path
    record: JobRecord
    state: JobState
    totals: Totals


def list_jobs() -> list[JobStatus]:
    """Oldest first. A folder that cannot be read is left out: it may be going just now."""
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
    """The job with this id. Raises InvalidRequest."""
    for one in list_jobs():
        if one.record.id == name:
            return one
    raise InvalidRequest(f"there is no job {name}: see `outrider jobs`", "job")


def read_status(file: Path) -> JobStatus | None:
    """None where no job was begun."""
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
    """Who works on it leaves it within a second or so. Raises InvalidRequest for a job that is not there, or is finished."""
    one = find_job(name)
    if one.state == "finished":
        raise InvalidRequest(f"{name} is finished: there is nothing to cancel", "job")
    with open_index(one.file) as index:
        index.cancel()
    return one
