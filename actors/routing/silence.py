"""Decides from the heartbeats of a target when its silence means that it is lost."""

from collections import deque
from dataclasses import dataclass, field

SILENCE_FACTOR = 2.0  # a silence so many times the longest known one is a loss
MIN_SILENCE_S, MAX_SILENCE_S = 0.5, 1.5  # bounds of the silence that is a loss
KNOWN_HEARTBEATS = 600  # whose intervals are remembered: those of the last minute
MIN_HEARTBEATS = 20  # before these, only the longest silence is a loss
CHECK_PERIOD_S = 0.05  # between two looks at the clock
MAX_CHECK_S = 2 * CHECK_PERIOD_S  # what one look can add to a silence


@dataclass(slots=True)
class Silence:
    """The silence of one target, in seconds, as heard by somebody who looks at the clock often.

    A look adds at most MAX_CHECK_S: what is longer was a pause of the listener, not of the target.

    looked     clock reading of the last look
    quiet      since the last heartbeat
    intervals  between the last heartbeats
    """

    looked: float
    quiet: float = 0.0
    intervals: deque[float] = field(default_factory=lambda: deque(maxlen=KNOWN_HEARTBEATS))

    def look(self, now: float) -> None:
        self.quiet += min(MAX_CHECK_S, max(0.0, now - self.looked))
        self.looked = now

    def heartbeat(self, now: float) -> None:
        self.look(now)
        self.intervals.append(self.quiet)
        self.quiet = 0.0

    @property
    def limit(self) -> float:
        """Returns the seconds of silence that mean a loss: twice the longest of the last minute."""
        if len(self.intervals) < MIN_HEARTBEATS:
            return MAX_SILENCE_S
        return min(MAX_SILENCE_S, max(MIN_SILENCE_S, SILENCE_FACTOR * max(self.intervals)))

    @property
    def is_loss(self) -> bool:
        return self.quiet > self.limit

    @property
    def is_heard(self) -> bool:
        """Tells whether the target is surely there: it was silent for less than any loss."""
        return bool(self.intervals) and self.quiet < MIN_SILENCE_S / 2
