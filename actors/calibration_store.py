"""Loads and saves what a target or a drafter has learned of its pair, in a small JSON file."""

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runtime.config import TargetConfig
from runtime.model_paths import calibration_file
from runtime.schedulers.base import Scheduler
from runtime.schedulers.living import Living
from runtime.scoring.calibration import Calibrations

INVALID = (OSError, ValueError, KeyError, TypeError, AttributeError)

log = logging.getLogger(__name__)


def load_calibrations(file: Path) -> Calibrations:
    """Returns the saved calibrations.

    If the file is missing or invalid they are empty, and a few hundred tokens teach them again.
    """
    try:
        return Calibrations.from_dict(json.loads(file.read_text("utf-8")))
    except FileNotFoundError:
        return Calibrations()
    except INVALID as error:
        warn_invalid(error)
        return Calibrations()


def warn_invalid(error: Exception) -> None:
    log.warning("the saved calibrations cannot be read (%s): starting afresh", type(error).__name__)


def save_calibrations(file: Path, known: Calibrations) -> None:
    """Replaces the file atomically. A write error is logged; the next process then starts cold."""
    save_json(file, known.to_dict())


def target_state_file(config: TargetConfig) -> Path:
    """Returns the file in which a target keeps what it has learned.

    There is one for each model, precision, device and processor. Drafters have entries of their
    own in it.
    """
    from runtime.kernels.kernel_choice import processor  # loads torch

    where = f"{config.dtype} {config.device} {processor()}"
    return calibration_file(config.model, "target", where)


def load_target_state(file: Path, scheduler: Scheduler) -> Calibrations:
    """Returns the saved calibrations, and lets the living schedule begin with what it had learned:
    the times of its steps, and whether speculation pays.

    If the file is missing or invalid, both start afresh.
    """
    try:
        saved = json.loads(file.read_text("utf-8"))
        known = Calibrations.from_dict(saved["calibrations"])
        if isinstance(scheduler, Living) and saved["living"] is not None:
            scheduler.restore(saved["living"])
    except FileNotFoundError:
        return Calibrations()
    except INVALID as error:
        warn_invalid(error)
        return Calibrations()
    return known


def save_target_state(file: Path, known: Calibrations, schedulers: Iterable[Scheduler]) -> None:
    """Replaces the file atomically, as `save_calibrations` does."""
    living = next((one.to_dict() for one in schedulers if isinstance(one, Living)), None)
    save_json(file, {"calibrations": known.to_dict(), "living": living})


def save_json(file: Path, content: dict[str, Any]) -> None:
    temporary = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content), "utf-8")
        temporary.replace(file)
    except OSError as error:
        log.warning("the calibrations cannot be saved: %s", error.strerror)
