"""The jobs of this user on this machine, as they are now."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from actors.jobs import folders
from actors.jobs.index import Record, Totals, reading
from runtime.core.errors import InvalidRequest, Unavailable

State = Literal["running", "finished", "cancelled", "stopped"]


@dataclass(frozen=True, slots=True)
class Known:
    """`stopped`: it was interrupted, and goes on when it is submitted again."""

    file: Path
    record: Record
    state: State
    totals: Totals


def known() -> list[Known]:
    """Oldest first. A folder that cannot be read is left out: it may be going just now."""
    found: list[Known] = []
    for file in folders.indices():
        try:
            one = look(file)
        except Unavailable:
            continue
        if one is not None:
            found.append(one)
    return sorted(found, key=lambda one: one.record.created)


def find(name: str) -> Known:
    """The job with this id. Raises InvalidRequest."""
    for one in known():
        if one.record.id == name:
            return one
    raise InvalidRequest(f"there is no job {name}: see `outrider jobs`", "job")


def look(file: Path) -> Known | None:
    """None where no job was begun."""
    with reading(file) as index:
        record = index.record()
        if record is None:
            return None
        if index.finished():
            state: State = "finished"
        elif folders.busy(file.parent):
            state = "running"
        else:
            state = "cancelled" if index.cancelled() else "stopped"
        return Known(file, record, state, index.totals())


def cancel(name: str) -> Known:
    """Who works on it leaves it within a second or so. Raises InvalidRequest for a job that is not there, or is finished."""
    one = find(name)
    if one.state == "finished":
        raise InvalidRequest(f"{name} is finished: there is nothing to cancel", "job")
    with reading(one.file) as index:
        index.cancel()
    return one
