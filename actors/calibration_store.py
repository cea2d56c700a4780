"""What a target or a drafter has learned of its pair, kept between its lives in a small JSON file."""

import json
import logging
import os
from pathlib import Path

from runtime.scoring.calibration import Calibrations

log = logging.getLogger(__name__)


def load_calibrations(file: Path) -> Calibrations:
    """What was kept there; nothing where there is no such file, or none of ours: that costs a few hundred tokens of learning."""
    try:
        return Calibrations.from_dict(json.loads(file.read_text("utf-8")))
    except FileNotFoundError:
        return Calibrations()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning(
            "what was learned before cannot be read (%s): learning anew", type(error).__name__
        )
        return Calibrations()


def save_calibrations(file: Path, known: Calibrations) -> None:
    """Replace the file as a whole. A disk that refuses it is logged: the next life starts cold."""
    draft = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(known.to_dict()), "utf-8")
        draft.replace(file)
    except OSError as error:
        log.warning("what was learned cannot be kept: %s", error.strerror)
