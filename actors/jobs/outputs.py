"""Writes answers: to a growing file, or, for object stores, as parts that are joined at the end."""

import contextlib
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from actors.jobs.folders import SUFFIX
from actors.jobs.index import OutputMark
from actors.jobs.items import LINE_PREFIX, parse_output_line
from actors.jobs.lease import Lease, read_json, store_errors, write_json
from runtime.core.errors import InvalidRequest, Unavailable

PARTS_PER_FETCH = 64  # fetched at once
CHUNK_BYTES = 1 << 20  # read at once


class Output(Protocol):
    """The output of one job. It identifies answered items by custom_id, in any order."""

    def begin(self, job: str, fingerprint: str) -> str:
        """Claims the output for a new job; returns the job's ID.

        The ID is `job`, or the one under which another machine started the job. Raises
        InvalidRequest if the output belongs to something else.
        """

    def resume(self, mark: OutputMark) -> list[bytes]:
        """Discards partial writes after `mark`; returns complete lines that the index may not know.

        Raises InvalidRequest if the output is not as the job left it.
        """

    def append(self, lines: bytes) -> OutputMark:
        """Writes whole lines durably.

        Raises InvalidRequest if something else has changed the output.
        """

    def finish(self) -> None:
        """Completes the output. May be called again.

        Raises InvalidRequest if the output is missing or was changed.
        """


class FileOutput:
    """A local file.

    On resuming, bytes after the last mark are cut off, since they may be torn; their items are
    asked again. A file that something else has changed is never written: its digest is checked
    before the first and after the last write of a run, its size and identity before each write.
    `sync` flushes a file descriptor.
    """

    def __init__(self, path: Path, sync: Callable[[int], None] = os.fsync) -> None:
        self._path, self._size, self._digest, self._sync = path, 0, hashlib.sha256(), sync
        self._file: os.stat_result | None = None  # None until `resume`

    def begin(self, job: str, fingerprint: str) -> str:
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_size:
                raise InvalidRequest(
                    f"{self._path} exists and is not the output of a job on this file: give "
                    "another -o, or delete it",
                    "o",
                )
        return job

    def resume(self, mark: OutputMark) -> list[bytes]:
        try:
            file = os.open(self._path, os.O_RDWR | (0 if mark.position else os.O_CREAT), 0o644)
        except FileNotFoundError as error:
            raise self._changed("is missing") from error
        except OSError as error:
            raise InvalidRequest(
                f"cannot write {self._path} ({error.strerror}): give another -o", "o"
            ) from error
        with os.fdopen(file, "r+b") as opened:
            self._digest = _hash_prefix(opened, mark.position)
            if mark.position and self._digest.hexdigest() != mark.digest:
                raise self._changed("is not as its job left it")
            if not _is_torn_line(opened.read(len(LINE_PREFIX))):
                raise self._changed("contains more than its job has written")
            opened.truncate(mark.position)  # the next append makes it durable
            self._file = os.fstat(file)
        self._sync_folder()
        self._size = mark.position
        return []

    def append(self, lines: bytes) -> OutputMark:
        try:
            with self._path.open("r+b") as file:
                self._check(os.fstat(file.fileno()))
                file.seek(self._size)
                file.write(lines)
                file.flush()
                self._sync(file.fileno())
        except OSError as error:
            raise Unavailable(
                f"cannot write {self._path} ({error.strerror}): fix it and run the same command "
                "again"
            ) from error
        self._size += len(lines)
        self._digest.update(lines)
        return OutputMark(self._size, self._digest.hexdigest())

    def finish(self) -> None:
        try:
            with self._path.open("rb") as file:
                if self._file is not None:
                    self._check(os.fstat(file.fileno()))
                    if _hash_prefix(file, self._size).digest() != self._digest.digest():
                        raise self._changed("was changed while its job was running")
        except FileNotFoundError as error:
            raise self._changed("is missing") from error
        except OSError as error:
            raise Unavailable(
                f"cannot read {self._path} ({error.strerror}): fix it and run the same command "
                "again"
            ) from error

    def _sync_folder(self) -> None:
        """Makes the file's directory entry durable."""
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            self._sync(folder)
        finally:
            os.close(folder)

    def _check(self, found: os.stat_result) -> None:
        if (
            self._file is None
            or not os.path.samestat(found, self._file)
            or found.st_size != self._size
        ):
            raise self._changed("was changed while its job was running")

    def _changed(self, how: str) -> InvalidRequest:
        return InvalidRequest(
            f"{self._path} {how}: restore it and run the same command again, or delete it and "
            f"{self._path}{SUFFIX} to start over",
            "o",
        )


class PartsOutput:
    """An object at any URL that fsspec can write.

    Its parts and `job.json` are under URL.job until it is complete. Parts appear atomically, as
    objects do, so nothing is cut off. They are the source of truth: a machine without an index can
    resume the job. `position` counts parts. If two processes work on the job at once (see
    actors.jobs.lease), an item that both have answered is still in the output once.
    """

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path, self._folder = fs, path, path + SUFFIX
        self._owner, self._position = uuid.uuid4().hex[:12], 0

    @store_errors()
    def begin(self, job: str, fingerprint: str) -> str:
        found = self._found()
        if found is None:
            if self._fs.exists(self._path):
                raise InvalidRequest(
                    f"{self._path} exists and is not the output of a job on this file: give "
                    "another -o, or delete it",
                    "o",
                )
            write_json(
                self._fs,
                f"{self._folder}/job.json",
                {"id": job, "fingerprint": fingerprint, "whole": False},
            )
            return job
        if found["fingerprint"] != fingerprint:
            raise InvalidRequest(
                f"{self._path} is the output of a job on another file: give another -o, or delete "
                f"{self._folder}",
                "o",
            )
        return str(found["id"])

    @store_errors()
    def resume(self, mark: OutputMark) -> list[bytes]:
        if self._job()["whole"]:
            with self._fs.open(self._path, "rb") as whole:
                return list(whole)
        parts = self._parts()
        if len(parts) < mark.position:
            raise self._incomplete()
        self._position = len(parts)
        return (
            []
            if len(parts) == mark.position
            else [line for data in self._fetched(parts) for line in data.splitlines(keepends=True)]
        )

    @store_errors()
    def append(self, lines: bytes) -> OutputMark:
        self._fs.pipe_file(f"{self._folder}/part-{self._position:08d}-{self._owner}", lines)
        self._position += 1
        return OutputMark(self._position)

    @store_errors()
    def finish(self) -> None:
        job = self._job()
        if job["whole"] and not self._fs.exists(self._path):
            raise InvalidRequest(
                f"{self._path} is missing: restore it, or delete {self._folder} to start over", "o"
            )
        parts = self._parts()
        if not job["whole"]:
            if len(parts) < self._position:
                raise self._incomplete()
            seen: set[str] = set()
            with self._fs.open(self._path, "wb") as whole:
                for data in self._fetched(parts):
                    whole.write(
                        b"".join(
                            line for line in data.splitlines(keepends=True) if _is_first(line, seen)
                        )
                    )
            write_json(self._fs, f"{self._folder}/job.json", job | {"whole": True})
        for part in parts:
            self._fs.rm_file(part)

    def _job(self) -> dict[str, Any]:
        found = self._found()
        if found is None:
            raise InvalidRequest(
                f"{self._folder}/job.json is missing: restore it, or give another -o", "o"
            )
        return found

    def _found(self) -> dict[str, Any] | None:
        """Returns the content of job.json; None if there is none."""
        try:
            found = read_json(self._fs, f"{self._folder}/job.json")
        except ValueError:
            found = {}
        if found is not None and not (
            isinstance(found, dict) and found.keys() >= {"id", "fingerprint", "whole"}
        ):
            raise InvalidRequest(
                f"cannot read {self._folder}/job.json: restore it, or delete {self._folder} to "
                "start over",
                "o",
            )
        return found

    def _incomplete(self) -> InvalidRequest:
        return InvalidRequest(
            f"answers are missing from {self._folder}: restore them, or delete it to start over",
            "o",
        )

    def _parts(self) -> list[str]:
        self._fs.invalidate_cache(self._folder)
        return sorted(path for path in self._fs.ls(self._folder, detail=False) if "/part-" in path)

    def _fetched(self, parts: list[str]) -> Iterator[bytes]:
        for first in range(0, len(parts), PARTS_PER_FETCH):
            some = parts[first : first + PARTS_PER_FETCH]
            found = self._fs.cat(some)
            yield from (found[path] for path in some)


class Destination(NamedTuple):
    """An output, its path if it is a local file, and otherwise the lease that guards it."""

    output: Output
    file: Path | None = None
    lease: Lease | None = None


def resolve_output(url: str) -> Destination:
    """Returns the output at a path or URL. Raises InvalidRequest if it cannot be written."""
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (
        ImportError,
        ValueError,
    ) as error:  # an unknown protocol, or its package is not installed
        raise InvalidRequest(
            f"cannot write {url} ({error}): give a path, or a URL that fsspec knows", "o"
        ) from error
    if not isinstance(fs, LocalFileSystem):
        return Destination(PartsOutput(fs, path), lease=Lease(fs, path + SUFFIX))
    file = Path(os.path.realpath(path))  # links to one file are one output
    if not file.parent.is_dir():
        raise InvalidRequest(
            f"folder {file.parent} does not exist: make it, or give another -o", "o"
        )
    if file.exists() and not file.is_file():
        raise InvalidRequest(f"{file} is not a regular file: give another -o", "o")
    return Destination(FileOutput(file), file)


def _hash_prefix(file: IO[bytes], size: int) -> "hashlib._Hash":
    """Returns the SHA-256 of at most `size` bytes, and leaves the file positioned behind them."""
    digest = hashlib.sha256()
    while size and (piece := file.read(min(size, CHUNK_BYTES))):
        digest.update(piece)
        size -= len(piece)
    return digest


def _is_torn_line(tail: bytes) -> bool:
    """Tells whether `tail` may be a line that this job wrote in part, or zeros of a power loss."""
    return LINE_PREFIX.startswith(tail) or not tail.strip(b"\0")


def _is_first(line: bytes, seen: set[str]) -> bool:
    name, _ = parse_output_line(line)
    new = name not in seen
    seen.add(name)
    return new
