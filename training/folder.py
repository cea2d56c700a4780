"""The output folder of a training: built in OUT.partial, where an interrupted run resumes, and
renamed to OUT once complete."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from runtime.core.errors import InvalidRequest

RECIPE, LOCK, FINISHED = "recipe.json", "lock", "finished"


@contextmanager
def open_work(out: Path, recipe: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the work folder, locked for this process. `recipe` is everything that determines the
    result, as JSON.

    Raises InvalidRequest if `out` exists, if its unfinished work has another recipe or is in use,
    and for disk errors inside the block; the work then stays at its last checkpoint.
    """
    check_out_is_free(out)
    work = out.with_name(f"{out.name}.partial")
    with writable(out):
        work.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(work / LOCK, fallback_to_soft=False).acquire(timeout=0)
        except Timeout as error:
            raise InvalidRequest(
                f"{work} is in use by another training: wait for it, or give another --out",
                "out",
            ) from error
        with lock:
            check_recipe(work, recipe)
            yield work


def check_out_is_free(out: Path) -> None:
    """Raise InvalidRequest if the output folder is taken."""
    if not out.name:
        raise InvalidRequest(f"--out {out} has no name: give the folder to create", "out")
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise InvalidRequest(f"{out} already exists: give another --out, or remove it first", "out")


def check_recipe(work: Path, recipe: Mapping[str, Any]) -> None:
    """Store the recipe of new work, or check that it equals the stored one."""
    wanted = json.loads(json.dumps(recipe))
    file = work / RECIPE
    if not file.exists():
        if others := sorted(entry.name for entry in work.iterdir() if entry.name != LOCK):
            raise InvalidRequest(
                f"{work} contains other files ({others[0]}): give another --out, or remove it",
                "out",
            )
        write_atomically(file, json.dumps(wanted, indent=2).encode())
        return
    try:
        found = json.loads(file.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InvalidRequest(f"{file} is invalid JSON: remove {work} to start over", "out")
    if changed := sorted(
        key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)
    ):
        key = changed[0]
        change = f"{key} was {str(found.get(key))[:40]} and is {str(wanted.get(key))[:40]}"
        raise InvalidRequest(
            f"{work} is unfinished work with other settings ({change}): give the same "
            "settings, another --out, or remove it",
            "out",
        )


def publish(work: Path, out: Path) -> None:
    """Rename `work / FINISHED` to `out` and remove the rest. Until then `out` does not exist."""
    for file in (work / FINISHED).iterdir():
        fsync_path(file)
    if out.is_dir():
        out.rmdir()
    (work / FINISHED).rename(out)
    fsync_path(out.parent)
    shutil.rmtree(work)


@contextmanager
def writable(out: Path) -> Iterator[None]:
    """Turn disk errors inside the block into InvalidRequest."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise InvalidRequest(
            f"cannot write {out} ({why[:120]}): free space or give another --out; the same "
            "command resumes",
            "out",
        ) from error


def write_atomically(file: Path, content: bytes) -> None:
    """Write the file as a whole or not at all."""
    partial = file.with_name(f"{file.name}.tmp")
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def fsync_path(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
