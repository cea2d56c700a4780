"""Locates files: bundled models, folders trained for a target, and state kept between runs."""

import hashlib
import importlib.resources
import json
from pathlib import Path
from typing import Literal

from runtime.config import DrafterConfig, HeadConfig, PoolConfig
from runtime.core.cache_folder import cache_folder


def bundled_model(name: Literal["target", "draft"]) -> str:
    """Return the folder of a model that ships with the project."""
    return str(importlib.resources.files("models") / name)


def default_drafts(target: str | None) -> tuple[str, ...]:
    """Return what drafts for a target if the user does not say.

    It is the bundled draft for the bundled target; elsewhere prompt lookup and token recycling on
    the target, which need no training and no second device, and fit every vocabulary.
    """
    if target is None or target == bundled_model("target"):
        return (bundled_model("draft"),)
    return ("ngram-head", "token-recycling")


def head_folder(head: HeadConfig) -> Path | None:
    """Return the configured folder of a head, or else the bundled one.

    Bundled heads are trained for the bundled target. Returns None if the method has none.
    """
    folder = Path(head.folder or str(importlib.resources.files("models") / "heads" / head.method))
    return folder if head.folder or folder.is_dir() else None


def draft_model(drafter: DrafterConfig | PoolConfig) -> str:
    """Return what a drafter loads: the configured model or folder, or what ships for its method."""
    folder = importlib.resources.files("models") / drafter.method
    return drafter.model or (str(folder) if folder.is_dir() else "")


def trained_method(folder: str) -> str:
    """Return the method that a folder was trained for; empty for any other folder or name."""
    try:
        return str(json.loads((Path(folder) / "config.json").read_bytes())["method"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def calibration_file(model: str, role: Literal["target", "drafter"], method: str = "") -> Path:
    """Return the file in which a target or a drafter keeps its calibrations for one model."""
    name = hashlib.sha256(
        f"{Path(model).resolve() if Path(model).exists() else model}\n{method}".encode()
    ).hexdigest()[:16]
    return cache_folder() / f"{role}-{name}.json"


def drafter_calibration_file(config: DrafterConfig, target: str) -> Path:
    """Return the file in which drafters of this kind keep their calibrations for a target."""
    return calibration_file(
        target,
        "drafter",
        f"{config.method} {config.model}" + "".join(f" {layer}" for layer in config.layers),
    )
