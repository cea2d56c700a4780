"""Stores the state of jobs in folders, and locks each job for one process."""

import hashlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from runtime.core.errors import InvalidRequest, Unavailable

SUFFIX = ".job"
INDEX = "index.sqlite"
INDEX_FILES = (INDEX, f"{INDEX}-journal", f"{INDEX}-shm", f"{INDEX}-wal")  # those of SQLite
JOB_TABLE = "job"
LOCK = "owner"
PID_BYTES = b"0123456789\0"  # of a lock file, which a power loss may have filled with zeros
LOCK_TIMEOUT_S = 0.2  # `is_locked` in another process may hold the lock for a moment
LOCK_POLL_PERIOD_S = 0.05


def jobs_folder() -> Path:
    """Returns the folder with the state of the user's jobs, or links to it."""
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "outrider" / "jobs"


def state_folder(output: str, local: Path | None) -> Path:
    """Returns the folder with the state of the job that writes `output`.

    It is next to a local output file (`local`), and in the user's own folder for a URL.
    """
    return local.with_name(local.name + SUFFIX) if local else jobs_folder() / _short_hash(output)


def register_job(folder: Path) -> None:
    """Links a job's folder so that `outrider jobs` finds it, if that is possible."""
    link = jobs_folder() / _short_hash(str(folder))
    if folder.parent != jobs_folder():
        with suppress(OSError):
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(folder, target_is_directory=True)


def list_index_files() -> list[Path]:
    """Returns the index files of all jobs of the user."""
    return list(jobs_folder().glob(f"*/{INDEX}"))


@contextmanager
def lock_job(folder: Path) -> Iterator[None]:
    """Creates the folder and locks it for this process.

    The kernel releases the lock when the process ends, even if it is killed. If the folder has no
    index at the end, it is left as it was found.

    Raises Unavailable if another process holds the lock, and InvalidRequest if the folder cannot be
    created, or has files of the user under the names of a job's own.
    """
    made = not folder.exists()
    _check_names(folder)
    lock = FileLock(
        folder / LOCK,
        timeout=LOCK_TIMEOUT_S,
        poll_interval=LOCK_POLL_PERIOD_S,
        fallback_to_soft=False,
        on_acquired=_write_pid,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise Unavailable(
            f"process {_read_pid(folder)} works on the job in {folder}: wait for it, or stop it "
            "first"
        ) from error
    except FileNotFoundError as error:
        raise Unavailable(
            f"another process has just released the job in {folder}: try again"
        ) from error
    except OSError as error:
        raise InvalidRequest(
            f"cannot create {folder} ({error.strerror}): give -o a path where it can be created",
            "o",
        ) from error
    try:
        yield
    finally:
        if not (folder / INDEX).exists():
            _clean_up(folder, made)
        lock.release()


def is_locked(folder: Path) -> bool:
    """Tells whether a process is working on the job."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(
            folder / LOCK,
            timeout=LOCK_TIMEOUT_S,
            poll_interval=LOCK_POLL_PERIOD_S,
            fallback_to_soft=False,
        ):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def delete_index(folder: Path) -> None:
    """Deletes the index from the folder, and nothing else."""
    for name in INDEX_FILES:
        (folder / name).unlink(missing_ok=True)


def _check_names(folder: Path) -> None:
    """Raises InvalidRequest if the folder has a lock file or an index that no job has made."""
    index, lock = folder / INDEX, folder / LOCK
    with suppress(OSError):
        foreign = None
        if index.exists():
            foreign = index if _is_foreign_database(index) else None
        elif lock.exists():
            foreign = lock if lock.read_bytes().strip(PID_BYTES) else None
        if foreign is not None:
            raise InvalidRequest(
                f"{foreign} does not belong to a job: move it, or give another -o", "o"
            )


def _is_foreign_database(file: Path) -> bool:
    """Tells whether it has tables, but not a job's. What SQLite cannot read is found out later."""
    with (
        suppress(sqlite3.Error),
        closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as base,
    ):
        tables = {name for (name,) in base.execute("SELECT name FROM sqlite_master")}
        return bool(tables) and JOB_TABLE not in tables
    return False


def _clean_up(folder: Path, made: bool) -> None:
    with suppress(OSError):
        (folder / LOCK).unlink()
        if made:
            folder.rmdir()


def _write_pid(lock: int) -> None:
    """Writes this process's ID into the lock file."""
    os.truncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)


def _read_pid(folder: Path) -> str:
    """Returns the process ID in the lock file, or "unknown", since a crash may have torn it."""
    with suppress(OSError):
        written = (folder / LOCK).read_bytes()
        if written.isdigit():
            return written.decode()
    return "unknown"


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
