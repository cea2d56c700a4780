"""Where jobs keep their state, how one process claims a job, and which jobs this user has."""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.errors import InvalidRequest, Unavailable

SUFFIX = ".job"
INDEX = "index.sqlite"
LOCK = "owner"
KNOCKS, KNOCK = 4, 0.05  # seconds: `busy` holds the lock for a moment to ask for it


def known() -> Path:
    """The folder that has all jobs of this user: their state, or a link to it."""
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "outrider" / "jobs"


def state_of(output: str, local: Path | None) -> Path:
    """The folder of the job that writes `output`: beside it where it is a file (`local`), else among the user's own."""
    return local.with_name(local.name + SUFFIX) if local else known() / _short(output)


def enter(folder: Path) -> None:
    """`outrider jobs` finds it from now on. Where that is not possible it does without."""
    link = known() / _short(str(folder))
    if folder.parent != known():
        with suppress(OSError):
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(folder, target_is_directory=True)


def indices() -> list[Path]:
    """The files of all jobs of this user."""
    return list(known().glob(f"*/{INDEX}"))


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Makes the folder; nobody else has it inside the block. The kernel ends the claim with the process, however that ends.

    A folder that has no index in the end is left as it was found.

    Raises Unavailable where another process has it, InvalidRequest where the folder cannot be.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InvalidRequest(
            f"{folder} cannot be made ({error.strerror}): give -o a place where a folder can stand beside it", "o"
        ) from error
    try:
        if not any(_locked(file) for _ in range(KNOCKS)):
            written = os.pread(file, 32, 0)
            owner = written.decode() if written.isdigit() else "unknown"  # a crash may have torn it
            raise Unavailable(f"process {owner} works on the job in {folder}: wait for it, or end it first")
        if not _is(file, folder / LOCK):
            raise Unavailable(f"another process has just given up the job in {folder}: try again")
        os.truncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        try:
            yield
        finally:
            if not (folder / INDEX).exists():
                _leave(folder, made)
    finally:
        os.close(file)


def forget(folder: Path) -> None:
    """Takes the index out of the folder, and nothing else."""
    for file in folder.glob(f"{INDEX}*"):
        file.unlink()


def _leave(folder: Path, made: bool) -> None:
    with suppress(OSError):
        (folder / LOCK).unlink()
        if made:
            folder.rmdir()


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(KNOCK)
        return False
    return True


def busy(folder: Path) -> bool:
    """Whether a process works on the job."""
    try:
        file = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(file)


def _is(file: int, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
