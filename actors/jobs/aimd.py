"""Limits the items in flight by additive increase and multiplicative decrease (AIMD).

The deployment does not say how many requests it admits, so the limit is found by trying.
"""

from dataclasses import dataclass

INITIAL_SIZE = 4  # in flight at the start
MIN_PAUSE_S, MAX_PAUSE_S = 0.1, 5.0  # seconds of a pause


@dataclass(slots=True)
class AimdWindow:
    """Grows by one item per round of answers, and shrinks to what was admitted after a refusal.

    max_size  upper bound of `size`
    pause     seconds to wait before the next item while nothing is in flight, since no answer can
              then show that there is room; each refusal in a row doubles it
    """

    max_size: int
    size: float = INITIAL_SIZE
    pause: float = 0.0

    def __post_init__(self) -> None:
        self.size = min(self.size, self.max_size)

    def free(self, in_flight: int) -> int:
        """Returns how many more items may be sent."""
        return max(0, int(self.size) - in_flight)

    def on_answer(self) -> None:
        self.size = min(self.size + 1 / self.size, self.max_size)
        self.pause = 0.0

    def on_refusal(self, admitted: int) -> None:
        """Shrinks the window after items were refused while `admitted` others were not."""
        self.size = max(1, min(self.size, admitted))
        self.pause = min(MAX_PAUSE_S, 2 * self.pause or MIN_PAUSE_S)
