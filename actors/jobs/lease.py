"""A claim on a job whose output is at a URL, against other machines. Object stores have no locks, so it is a promise that expires."""

import json
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from runtime.core.errors import Unavailable

LEASE_S = 30.0  # seconds that it lasts; renewed while a process works on the job


class LeaseOwner(NamedTuple):
    """Who holds a lease, and until when, in seconds since 1970."""

    id: str
    host: str
    until: float


@contextmanager
def store_errors() -> Iterator[None]:
    """What a store refuses inside becomes Unavailable."""
    try:
        yield
    except OSError as error:
        raise Unavailable(
            f"the output cannot be reached ({error}): mend it and run the same command again"
        ) from error


class Lease:
    """`owner.json` in the job's folder `folder` on the fsspec filesystem `fs`.

    Two who begin in the same instant may both win, and machines whose clocks differ may see the end of a lease early or late; either costs
    work that is done twice, nothing else.
    """

    def __init__(
        self, fs: Any, folder: str, now: Callable[[], float] = time.time, host: str | None = None
    ) -> None:
        self._fs, self._file, self._now = fs, f"{folder}/owner.json", now
        self._id, self._host = uuid.uuid4().hex[:12], host or socket.gethostname()
        self._until = 0.0

    @store_errors()
    def hold(self) -> None:
        """To be called more often than every LEASE / 2 seconds. Raises Unavailable where somebody else has it."""
        now = self._now()
        if now < self._until - LEASE_S / 2:
            return
        owner = self._owner()
        # One of this very host is gone: its claim on the folder of the index was free (actors.jobs.folders).
        if (
            owner is not None
            and owner.id != self._id
            and owner.host != self._host
            and now < owner.until
        ):
            raise Unavailable(
                f"host {owner.host} works on this job: end it there, or wait {LEASE_S:g} s after it is gone"
            )
        self._until = now + LEASE_S
        write_json(self._fs, self._file, {"id": self._id, "host": self._host, "until": self._until})

    def release(self) -> None:
        """Gives it up, where it is held. A store that cannot be reached lets it expire."""
        with suppress(OSError):
            owner = self._owner()
            if owner is not None and owner.id == self._id:
                self._fs.rm_file(self._file)

    def _owner(self) -> LeaseOwner | None:
        """None where nobody holds it. A torn file has no owner: whoever wrote it is gone, or writes it again."""
        try:
            found = read_json(self._fs, self._file)
            return (
                None
                if found is None
                else LeaseOwner(str(found["id"]), str(found["host"]), float(found["until"]))
            )
        except (ValueError, KeyError, TypeError):
            return None


def read_json(fs: Any, file: str) -> dict[str, Any] | None:
    """None where there is no such object. Raises ValueError where it is not JSON."""
    try:
        found: dict[str, Any] = json.loads(fs.cat_file(file))
    except FileNotFoundError:
        return None
    return found


def write_json(fs: Any, file: str, content: dict[str, Any]) -> None:
    fs.pipe_file(file, json.dumps(content).encode())
