"""Locates files: bundled models, what was trained for a target, and what is kept between runs."""

import hashlib
import importlib.resources
import json
import os
from pathlib import Path
from typing import Literal

from runtime.config import DrafterConfig, HeadConfig, PoolConfig


def bundled_model(name: Literal["target", "draft"]) -> str:
    """Folder of a model that comes with the project."""
    return str(importlib.resources.files("models") / name)


def head_folder(head: HeadConfig) -> Path | None:
    """As configured, or of the head that comes with the project, trained for the target that does; None where none does."""
    folder = Path(head.folder or str(importlib.resources.files("models") / "heads" / head.method))
    return folder if head.folder or folder.is_dir() else None


def draft_model(drafter: DrafterConfig | PoolConfig) -> str:
    """The model, or the folder of what was trained, that it drafts with: as configured, or what comes with the project for its method."""
    folder = importlib.resources.files("models") / drafter.method
    return drafter.model or (str(folder) if folder.is_dir() else "")


def trained_method(folder: str) -> str:
    """The method that something was trained for; nothing for any other folder or name."""
    try:
        return str(json.loads((Path(folder) / "config.json").read_bytes())["method"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def cache_folder() -> Path:
    """What this project keeps between its runs: beside the user's other caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "outrider"


def calibration_file(model: str, role: Literal["target", "drafter"], method: str = "") -> Path:
    """The file in which a target or a drafter keeps what it has learned of one model."""
    name = hashlib.sha256(
        f"{Path(model).resolve() if Path(model).is_dir() else model}\n{method}".encode()
    ).hexdigest()[:16]
    return cache_folder() / f"{role}-{name}.json"


def drafter_calibration_file(config: DrafterConfig, target: str) -> Path:
    """As memory_of: what this kind of drafter has learned of this target."""
    return calibration_file(
        target,
        "drafter",
        f"{config.method} {config.model}" + "".join(f" {layer}" for layer in config.layers),
    )
