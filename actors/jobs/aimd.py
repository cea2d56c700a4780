"""How many items are in flight: what the deployment admits, found by trying."""

from dataclasses import dataclass

INITIAL_SIZE = 4  # in flight at the start
MIN_PAUSE_S, MAX_PAUSE_S = 0.1, 5.0  # seconds of a pause


@dataclass(slots=True)
class AimdWindow:
    """One more after each round of answers; after a refusal no more than were not refused. `max_size` bounds it.

    pause  seconds to wait before the next item, where nothing is in flight whose end would tell that there is room: doubled by each
           refusal that no answer came before
    """

    max_size: int
    size: float = INITIAL_SIZE
    pause: float = 0.0

    def __post_init__(self) -> None:
        self.size = min(self.size, self.max_size)

    def free(self, in_flight: int) -> int:
        """For how many more."""
        return max(0, int(self.size) - in_flight)

    def on_answer(self) -> None:
        self.size = min(self.size + 1 / self.size, self.max_size)
        self.pause = 0.0

    def on_refusal(self, admitted: int) -> None:
        """Some were; so many others were not."""
        self.size = max(1, min(self.size, admitted))
        self.pause = min(MAX_PAUSE_S, 2 * self.pause or MIN_PAUSE_S)
