"""Leases a job whose output is at a URL, so that only one machine works on it.

Object stores have no locks, so the lease is an object that expires.
"""

import json
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from runtime.core.errors import Unavailable

LEASE_S = 30.0  # renewed while a process works on the job


class LeaseOwner(NamedTuple):
    """The holder of a lease. `until` is Unix time in seconds."""

    id: str
    host: str
    until: float


@contextmanager
def store_errors() -> Iterator[None]:
    """Turns errors of the object store inside the block into Unavailable."""
    try:
        yield
    except OSError as error:
        raise Unavailable(
            f"cannot reach the output ({error}): fix it and run the same command again"
        ) from error


class Lease:
    """The object `owner.json` in the job's folder `folder` on the fsspec filesystem `fs`.

    Two machines that start at the same instant may both win, and machines whose clocks differ may
    see a lease end early or late. Either costs duplicate work, and nothing else.
    """

    def __init__(
        self, fs: Any, folder: str, now: Callable[[], float] = time.time, host: str | None = None
    ) -> None:
        self._fs, self._file, self._now = fs, f"{folder}/owner.json", now
        self._id, self._host = uuid.uuid4().hex[:12], host or socket.gethostname()
        self._until = 0.0

    @store_errors()
    def hold(self) -> None:
        """Takes or renews the lease. Call it at least every LEASE_S / 2 seconds.

        Raises Unavailable if another process holds it.
        """
        now = self._now()
        if now < self._until - LEASE_S / 2:
            return
        owner = self._owner()
        # An owner on this host has ended: this process holds the lock of its folder.
        if (
            owner is not None
            and owner.id != self._id
            and owner.host != self._host
            and now < owner.until
        ):
            raise Unavailable(
                f"host {owner.host} works on this job: stop it there, or wait {LEASE_S:g} s after "
                "it has ended"
            )
        self._until = now + LEASE_S
        write_json(self._fs, self._file, {"id": self._id, "host": self._host, "until": self._until})

    def release(self) -> None:
        """Deletes the lease if it is held. If the store cannot be reached, the lease expires."""
        with suppress(OSError):
            owner = self._owner()
            if owner is not None and owner.id == self._id:
                self._fs.rm_file(self._file)

    def _owner(self) -> LeaseOwner | None:
        """Returns the holder; None if there is none, or a crash has torn the object."""
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
    """Returns the object; None if there is none. Raises ValueError if it is not JSON."""
    try:
        found: dict[str, Any] = json.loads(fs.cat_file(file))
    except FileNotFoundError:
        return None
    return found


def write_json(fs: Any, file: str, content: dict[str, Any]) -> None:
    fs.pipe_file(file, json.dumps(content).encode())
