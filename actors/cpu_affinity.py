"""Pins a process to its cores and loads heavy modules at low priority.

This module imports nothing slow, since it runs before anything slow is loaded.
"""

import contextlib
import importlib
import os
import sys
from threading import Thread

from runtime.config import Placement

# Python's default of 5 ms would let the model's thread delay the event loop.
SWITCH_INTERVAL_S = 0.0002
# With this niceness, a process that serves on the same core still gets three quarters of it.
LOADING_NICENESS = 5


def pin(placement: Placement) -> None:
    """Pins this thread, and every thread that it starts, to the placement's cores."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    if placement.cores:
        os.sched_setaffinity(0, placement.cores)


def import_at_low_priority(module: str) -> None:
    """Imports a slow module on a low-priority thread, so that a start does not slow down others.

    If the import fails, the next import of the module raises the error.
    """

    def load() -> None:
        os.nice(LOADING_NICENESS)  # affects this thread alone; only root could undo it
        with contextlib.suppress(ImportError):
            importlib.import_module(module)

    thread = Thread(target=load, name="load")
    thread.start()
    thread.join()
