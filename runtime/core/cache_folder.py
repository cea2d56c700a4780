"""Locates the folder for state kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the project's folder inside the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "outrider"
