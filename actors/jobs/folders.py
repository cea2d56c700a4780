"""Where jobs keep their state, how one process claims a job, and which jobs this user has."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from runtime.core.errors import InvalidRequest, Unavailable

SUFFIX = ".job"
INDEX = "index.sqlite"
LOCK = "owner"
LOCK_TIMEOUT_S, LOCK_POLL_PERIOD_S = (
    0.2,
    0.05,
)  # seconds that a lock is asked for, and between two tries: `busy` holds it for a moment


def jobs_folder() -> Path:
    """The folder that has all jobs of this user: their state, or a link to it."""
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "outrider" / "jobs"


def state_folder(output: str, local: Path | None) -> Path:
    """The folder of the job that writes `output`: beside it where it is a file (`local`), else among the user's own."""
    return local.with_name(local.name + SUFFIX) if local else jobs_folder() / _short_hash(output)


def register_job(folder: Path) -> None:
    """`outrider jobs` finds it from now on. Where that is not possible it does without."""
    link = jobs_folder() / _short_hash(str(folder))
    if folder.parent != jobs_folder():
        with suppress(OSError):
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(folder, target_is_directory=True)


def list_index_files() -> list[Path]:
    """The files of all jobs of this user."""
    return list(jobs_folder().glob(f"*/{INDEX}"))


@contextmanager
def lock_job(folder: Path) -> Iterator[None]:
    """Makes the folder; nobody else has it inside the block. The kernel ends the claim with the process, however that ends.

    A folder that has no index in the end is left as it was found.

    Raises Unavailable where another process has it, InvalidRequest where the folder cannot be.
    """
    made = not folder.exists()
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
            f"process {_read_pid(folder)} works on the job in {folder}: wait for it, or end it first"
        ) from error
    except FileNotFoundError as error:
        raise Unavailable(
            f"another process has just given up the job in {folder}: try again"
        ) from error
    except OSError as error:
        raise InvalidRequest(
            f"{folder} cannot be made ({error.strerror}): give -o a place where a folder can stand beside it",
            "o",
        ) from error
    try:
        yield
    finally:
        if not (folder / INDEX).exists():
            _clean_up(folder, made)
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether a process works on the job."""
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
    """Takes the index out of the folder, and nothing else."""
    for file in folder.glob(f"{INDEX}*"):
        file.unlink()


def _clean_up(folder: Path, made: bool) -> None:
    with suppress(OSError):
        (folder / LOCK).unlink()
        if made:
            folder.rmdir()


def _write_pid(lock: int) -> None:
    """Writes who holds the lock into its file."""
    os.truncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)


def _read_pid(folder: Path) -> str:
    """The process that has signed the lock; a crash may have torn what it wrote."""
    with suppress(OSError):
        written = (folder / LOCK).read_bytes()
        if written.isdigit():
            return written.decode()
    return "unknown"


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
