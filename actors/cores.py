"""Which cores a process computes on. Loads nothing: it comes before what takes long to load."""

import os
import sys

from runtime.config import Placement

SWITCH_INTERVAL = 0.0002  # seconds; Python's own 5 ms would let the model's thread hold up the exchange


def settle(placement: Placement) -> None:
    """Stay on the given cores, from this thread on: the threads it starts inherit that."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    if placement.cores:
        os.sched_setaffinity(0, placement.cores)
