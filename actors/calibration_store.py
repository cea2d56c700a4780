"""Loads and saves what a target or a drafter has learned of its pair, in a small JSON file."""

import json
import logging
import os
from pathlib import Path

from runtime.scoring.calibration import Calibrations

log = logging.getLogger(__name__)


def load_calibrations(file: Path) -> Calibrations:
    """Returns the saved calibrations.

    If the file is missing or invalid they are empty, and a few hundred tokens teach them again.
    """
    try:
        return Calibrations.from_dict(json.loads(file.read_text("utf-8")))
    except FileNotFoundError:
        return Calibrations()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning(
            "the saved calibrations cannot be read (%s): starting afresh", type(error).__name__
        )
        return Calibrations()


def save_calibrations(file: Path, known: Calibrations) -> None:
    """Replaces the file atomically. A write error is logged; the next process then starts cold."""
    temporary = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(known.to_dict()), "utf-8")
        temporary.replace(file)
    except OSError as error:
        log.warning("the calibrations cannot be saved: %s", error.strerror)
