"""Defines the clock as a callable, so that a simulator can pass its own."""

from collections.abc import Callable

Clock = Callable[[], float]  # seconds, monotonic
