"""Which cores a process computes on, and who goes first there. Loads nothing: it comes before what takes long to load."""

import contextlib
import importlib
import os
import sys
from threading import Thread

from runtime.config import Placement

SWITCH_INTERVAL_S = (
    0.0002  # seconds; Python's own 5 ms would let the model's thread hold up the exchange
)
LOADING_NICENESS = 5  # how much lower the priority is of who loads: what serves on the same core gets three quarters of it


def pin(placement: Placement) -> None:
    """Stay on the given cores, from this thread on: the threads it starts inherit that."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    if placement.cores:
        os.sched_setaffinity(0, placement.cores)


def import_at_low_priority(module: str) -> None:
    """Import what takes long on a thread of low priority, which is over then: who starts does not hold up those that serve.

    Where that fails, the next import of it says why.
    """

    def load() -> None:
        os.nice(LOADING_NICENESS)  # of this thread alone: to rise again would take a privilege
        with contextlib.suppress(ImportError):
            importlib.import_module(module)

    thread = Thread(target=load, name="load")
    thread.start()
    thread.join()
