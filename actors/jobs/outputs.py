"""Where answers go: a file that grows, or, where objects cannot grow, parts that are joined at the end."""

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

PARTS_PER_FETCH = 64  # parts that are fetched at one time
CHUNK_BYTES = 1 << 20  # bytes that are read at one time


class Output(Protocol):
    """What one job writes, and who may. The names of answered items, not their order, are its business."""

    def begin(self, job: str, fingerprint: str) -> str:
        """A job with no index here takes the output; returns the job's id: `job`, or that under which another machine began it.

        Raises InvalidRequest where the output is taken by something else.
        """

    def resume(self, mark: OutputMark) -> list[bytes]:
        """Undoes what was half done after `mark`, and returns whole lines that are kept and that the index may not know.

        Raises InvalidRequest where the output is not as the job left it.
        """

    def append(self, lines: bytes) -> OutputMark:
        """Writes whole lines, durable when this returns. Raises InvalidRequest where somebody else has changed the output."""

    def finish(self) -> None:
        """Everything is in its place. May be called again. Raises InvalidRequest where the output is gone, or changed by others."""


class FileOutput:
    """A local file. What was written after the last mark is cut off: it may be torn, and its items are asked again.

    Nothing is written to a file that somebody else has changed, by whatever way: its digest is compared before the first and after
    the last write of a life of the job, its size and identity before each. `sync` makes durable what a descriptor stands for.
    """

    def __init__(self, path: Path, sync: Callable[[int], None] = os.fsync) -> None:
        self._path, self._size, self._digest, self._sync = path, 0, hashlib.sha256(), sync
        self._file: os.stat_result | None = None  # None: this life of the job has not taken it up

    def begin(self, job: str, fingerprint: str) -> str:
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_size:
                raise InvalidRequest(
                    f"{self._path} exists and is not the output of a job on this file: give another -o, or delete it",
                    "o",
                )
        return job

    def resume(self, mark: OutputMark) -> list[bytes]:
        try:
            file = os.open(self._path, os.O_RDWR | (0 if mark.position else os.O_CREAT), 0o644)
        except FileNotFoundError as error:
            raise self._changed("is gone") from error
        except OSError as error:
            raise InvalidRequest(
                f"cannot write {self._path} ({error.strerror}): give another -o", "o"
            ) from error
        with os.fdopen(file, "r+b") as opened:
            self._digest = _hash_prefix(opened, mark.position)
            if mark.position and self._digest.hexdigest() != mark.digest:
                raise self._changed("is not as its job left it")
            if not _is_torn_line(opened.read(len(LINE_PREFIX))):
                raise self._changed("has more in it than its job has written")
            opened.truncate(
                mark.position
            )  # durable with the next answers; until then it is cut off again
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
                f"cannot write {self._path} ({error.strerror}): mend it and run the same command again"
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
                        raise self._changed("was changed by somebody else")
        except FileNotFoundError as error:
            raise self._changed("is gone") from error
        except OSError as error:
            raise Unavailable(
                f"cannot read {self._path} ({error.strerror}): mend it and run the same command again"
            ) from error

    def _sync_folder(self) -> None:
        """Makes the file's own entry in its folder durable."""
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
            raise self._changed("was changed by somebody else while its job was at work")

    def _changed(self, how: str) -> InvalidRequest:
        return InvalidRequest(
            f"{self._path} {how}: bring it back and run the same command again, or delete {self._path}{SUFFIX} and it to begin anew",
            "o",
        )


class PartsOutput:
    """An object at any URL that fsspec can write, with its parts and `job.json` under URL.job until it is whole.

    A part appears whole or not at all, as objects do, so nothing is cut off. The parts are the truth: a job can be taken up on a
    machine that has no index of it. `position` counts the parts. Should two processes have worked on the job at one time (see
    actors.jobs.lease), an item that both have answered still stands in the output once.
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
                    f"{self._path} exists and is not the output of a job on this file: give another -o, or delete it",
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
                f"{self._path} is the output of a job on another file: give another -o, or delete {self._folder}",
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
                f"{self._path} is gone: bring it back, or delete {self._folder} to begin anew", "o"
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
                f"{self._folder}/job.json is gone: bring it back, or give another -o", "o"
            )
        return found

    def _found(self) -> dict[str, Any] | None:
        """What job.json says; None where there is none."""
        try:
            found = read_json(self._fs, f"{self._folder}/job.json")
        except ValueError:
            found = {}
        if found is not None and not (
            isinstance(found, dict) and found.keys() >= {"id", "fingerprint", "whole"}
        ):
            raise InvalidRequest(
                f"{self._folder}/job.json cannot be read: bring it back, or delete {self._folder} to begin anew",
                "o",
            )
        return found

    def _incomplete(self) -> InvalidRequest:
        return InvalidRequest(
            f"answers are gone from {self._folder}: bring them back, or delete it to begin anew",
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
    """`file`: where it is a local one; else `lease` keeps other machines off it."""

    output: Output
    file: Path | None = None
    lease: Lease | None = None


def resolve_output(url: str) -> Destination:
    """Raises InvalidRequest for a path or a URL that cannot be written."""
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (
        ImportError,
        ValueError,
    ) as error:  # a protocol whose package is not installed, or that nobody knows
        raise InvalidRequest(
            f"cannot write {url} ({error}): give a path, or a URL that fsspec knows", "o"
        ) from error
    if not isinstance(fs, LocalFileSystem):
        return Destination(PartsOutput(fs, path), lease=Lease(fs, path + SUFFIX))
    file = Path(os.path.realpath(path))  # two links to one file are one output, with one job
    if not file.parent.is_dir():
        raise InvalidRequest(
            f"folder {file.parent} does not exist: make it, or give another -o", "o"
        )
    if file.exists() and not file.is_file():
        raise InvalidRequest(f"{file} is no regular file: give another -o", "o")
    return Destination(FileOutput(file), file)


def _hash_prefix(file: IO[bytes], size: int) -> "hashlib._Hash":
    """SHA-256 of so many bytes from the beginning of the file, or of all that there are; the file stands behind them then."""
    digest = hashlib.sha256()
    while size and (piece := file.read(min(size, CHUNK_BYTES))):
        digest.update(piece)
        size -= len(piece)
    return digest


def _is_torn_line(tail: bytes) -> bool:
    """Whether what stands behind the last mark can be of this job: the beginning of a line, or what the loss of power leaves."""
    return LINE_PREFIX.startswith(tail) or not tail.strip(b"\0")


def _is_first(line: bytes, seen: set[str]) -> bool:
    name, _ = parse_output_line(line)
    new = name not in seen
    seen.add(name)
    return new
