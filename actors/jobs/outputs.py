"""Where answers go: a file that grows, or, where objects cannot grow, parts that are joined at the end."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from actors.jobs.folders import SUFFIX
from actors.jobs.lease import Lease, read_json, write_json
from runtime.errors import InvalidRequest, Unavailable

TOGETHER = 64  # parts that are fetched at one time


class Output(Protocol):
    """What one job writes, and who may. The names of answered items, not their order, are its business."""

    def begin(self, job: str, fingerprint: str) -> str:
        """A job with no index here takes the output; returns the job's id: `job`, or that under which another machine began it.

        Raises InvalidRequest where the output is taken by something else.
        """

    def resume(self, position: int) -> list[bytes]:
        """Undoes what was half done after `position`, and returns whole lines that are kept and that the index may not know."""

    def append(self, lines: bytes) -> int:
        """Whole lines, durable when this returns; the position after them."""

    def finish(self) -> None:
        """Everything is in its place. May be called again. Raises InvalidRequest where the output is gone."""


class FileOutput:
    """A local file. What was written after the last known position is cut off: it may be torn, and its items are asked again."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0

    def begin(self, job: str, fingerprint: str) -> str:
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_size:
                raise InvalidRequest(f"{self._path} exists and is not the output of a job on this file: give another -o, or delete it", "o")
        return job

    def resume(self, position: int) -> list[bytes]:
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InvalidRequest(f"cannot write {self._path} ({error.strerror}): give another -o", "o") from error
        with os.fdopen(file, "r+b") as opened:
            if os.fstat(file).st_size < position:
                raise InvalidRequest(
                    f"{self._path} is shorter than its job left it: delete {self._path}{SUFFIX} to begin anew, or bring it back", "o"
                )
            opened.truncate(position)
            os.fsync(file)
        _sync_folder(self._path.parent)
        self._position = position
        return []

    def append(self, lines: bytes) -> int:
        try:
            with self._path.open("r+b") as file:
                file.seek(self._position)
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise Unavailable(f"cannot write {self._path} ({error.strerror}): mend it and run the same command again") from error
        self._position += len(lines)
        return self._position

    def finish(self) -> None:
        if not self._path.exists():
            raise InvalidRequest(f"{self._path} is gone: delete {self._path}{SUFFIX} to begin anew, or bring it back", "o")


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(f"the output cannot be reached ({error}): mend it and run the same command again") from error


class PartsOutput:
    """An object at any URL that fsspec can write, with its parts and `job.json` under URL.job until it is whole.

    A part appears whole or not at all, as objects do, so nothing is cut off. The parts are the truth: a job can be taken up on a
    machine that has no index of it. `position` counts the parts. Should two processes have worked on the job at one time (see
    actors.jobs.lease), an item that both have answered still stands in the output once.
    """

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path, self._folder = fs, path, path + SUFFIX
        self._owner, self._position = uuid.uuid4().hex[:12], 0

    @_reaching()
    def begin(self, job: str, fingerprint: str) -> str:
        found = read_json(self._fs, f"{self._folder}/job.json")
        if found is None:
            if self._fs.exists(self._path):
                raise InvalidRequest(f"{self._path} exists and is not the output of a job on this file: give another -o, or delete it", "o")
            write_json(self._fs, f"{self._folder}/job.json", {"id": job, "fingerprint": fingerprint, "whole": False})
            return job
        if found["fingerprint"] != fingerprint:
            raise InvalidRequest(f"{self._path} is the output of a job on another file: give another -o, or delete {self._folder}", "o")
        return str(found["id"])

    @_reaching()
    def resume(self, position: int) -> list[bytes]:
        if self._job()["whole"]:
            with self._fs.open(self._path, "rb") as whole:
                return list(whole)
        parts = self._parts()
        self._position = len(parts)
        return [] if len(parts) == position else [line for data in self._fetched(parts) for line in data.splitlines(keepends=True)]

    @_reaching()
    def append(self, lines: bytes) -> int:
        self._fs.pipe_file(f"{self._folder}/part-{self._position:08d}-{self._owner}", lines)
        self._position += 1
        return self._position

    @_reaching()
    def finish(self) -> None:
        job = self._job()
        if not job["whole"]:
            seen: set[str] = set()
            with self._fs.open(self._path, "wb") as whole:
                for data in self._fetched(self._parts()):
                    whole.write(b"".join(line for line in data.splitlines(keepends=True) if _new(line, seen)))
            write_json(self._fs, f"{self._folder}/job.json", job | {"whole": True})
        for part in self._parts():
            self._fs.rm_file(part)

    def _job(self) -> dict[str, Any]:
        found = read_json(self._fs, f"{self._folder}/job.json")
        if found is None:
            raise InvalidRequest(f"{self._folder}/job.json is gone: bring it back, or give another -o", "o")
        return found

    def _parts(self) -> list[str]:
        self._fs.invalidate_cache(self._folder)
        return sorted(path for path in self._fs.ls(self._folder, detail=False) if "/part-" in path)

    def _fetched(self, parts: list[str]) -> Iterator[bytes]:
        for first in range(0, len(parts), TOGETHER):
            some = parts[first : first + TOGETHER]
            found = self._fs.cat(some)
            yield from (found[path] for path in some)


class Destination(NamedTuple):
    """`file`: where it is a local one; else `lease` keeps other machines off it."""

    output: Output
    file: Path | None = None
    lease: Lease | None = None


def destination(url: str) -> Destination:
    """Raises InvalidRequest for a path or a URL that cannot be written."""
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # a protocol whose package is not installed, or that nobody knows
        raise InvalidRequest(f"cannot write {url} ({error}): give a path, or a URL that fsspec knows", "o") from error
    if not isinstance(fs, LocalFileSystem):
        return Destination(PartsOutput(fs, path), lease=Lease(fs, path + SUFFIX))
    file = Path(path)
    if not file.parent.is_dir():
        raise InvalidRequest(f"folder {file.parent} does not exist: make it, or give another -o", "o")
    return Destination(FileOutput(file), file)


def _sync_folder(folder: Path) -> None:
    """The file's own entry in it is durable."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _new(line: bytes, seen: set[str]) -> bool:
    name = json.loads(line)["custom_id"]
    new = name not in seen
    seen.add(name)
    return new
