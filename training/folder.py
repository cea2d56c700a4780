"""The result of a training: built in OUT.partial, where an interrupted one goes on, and named OUT once it is whole."""

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
    """The folder to work in, for as long as the block lasts for this process alone. `recipe`: all that decides the result, as JSON.

    Raises InvalidRequest where `out` is there already, where its unfinished work is of another recipe or under way elsewhere, and for
    what the disk refuses inside the block: the work stays as it was at the last checkpoint.
    """
    check_out_is_free(out)
    work = out.with_name(f"{out.name}.partial")
    with writable(out):
        work.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(work / LOCK, fallback_to_soft=False).acquire(timeout=0)
        except Timeout as error:
            raise InvalidRequest(
                f"{work} is being worked on by another training: wait for it, or give another --out",
                "out",
            ) from error
        with lock:
            check_recipe(work, recipe)
            yield work


def check_out_is_free(out: Path) -> None:
    """Raises InvalidRequest for a result's place that is taken."""
    if not out.name:
        raise InvalidRequest(f"--out {out} has no name: give the folder to be made", "out")
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise InvalidRequest(
            f"{out} is there already: give another --out, or remove it first", "out"
        )


def check_recipe(work: Path, recipe: Mapping[str, Any]) -> None:
    """Begin under this recipe, or go on under the same."""
    wanted = json.loads(json.dumps(recipe))
    file = work / RECIPE
    if not file.exists():
        if others := sorted(entry.name for entry in work.iterdir() if entry.name != LOCK):
            raise InvalidRequest(
                f"{work} holds something else ({others[0]}): give another --out, or remove it",
                "out",
            )
        write_atomically(file, json.dumps(wanted, indent=2).encode())
        return
    try:
        found = json.loads(file.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InvalidRequest(f"{file} is not readable: remove {work} to begin anew", "out")
    if changed := sorted(
        key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)
    ):
        key = changed[0]
        told = f"{key} was {str(found.get(key))[:40]} and is {str(wanted.get(key))[:40]}"
        raise InvalidRequest(
            f"{work} is unfinished work under other settings ({told}): give those again, another --out, or remove it",
            "out",
        )


def publish(work: Path, out: Path) -> None:
    """Give the folder `work / FINISHED` its name, and forget the rest. Until then there is no `out`."""
    for file in (work / FINISHED).iterdir():
        fsync_path(file)
    if out.is_dir():
        out.rmdir()
    (work / FINISHED).rename(out)
    fsync_path(out.parent)
    shutil.rmtree(work)


@contextmanager
def writable(out: Path) -> Iterator[None]:
    """What the disk refuses inside becomes InvalidRequest."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise InvalidRequest(
            f"cannot write {out} ({why[:120]}): make room or give another --out; the same command goes on",
            "out",
        ) from error


def write_atomically(file: Path, content: bytes) -> None:
    """Whole or not at all."""
    beside = file.with_name(f"{file.name}.tmp")
    with beside.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(file)


def fsync_path(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
