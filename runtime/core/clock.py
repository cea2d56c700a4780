"""Time is handed in, so that a simulator can hand in its own."""

from collections.abc import Callable

Clock = Callable[[], float]  # seconds, monotonic
