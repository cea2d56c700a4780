"""How many items are in flight: what the deployment admits, found by trying."""

from dataclasses import dataclass

FIRST = 4  # in flight at the start
SHORT, LONG = 0.1, 5.0  # seconds of a pause


@dataclass(slots=True)
class Window:
    """One more after each round of answers; after a refusal no more than were not refused. `most` bounds it.

    pause  seconds to wait before the next item, where nothing is in flight whose end would tell that there is room: doubled by each
           refusal that no answer came before
    """

    most: int
    size: float = FIRST
    pause: float = 0.0

    def __post_init__(self) -> None:
        self.size = min(self.size, self.most)

    def room(self, flying: int) -> int:
        """For how many more."""
        return max(0, int(self.size) - flying)

    def answered(self) -> None:
        self.size = min(self.size + 1 / self.size, self.most)
        self.pause = 0.0

    def refused(self, admitted: int) -> None:
        """Some were; so many others were not."""
        self.size = max(1, min(self.size, admitted))
        self.pause = min(LONG, 2 * self.pause or SHORT)
