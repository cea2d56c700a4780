"""The seam between a target and a drafter: one method, wherever the drafter runs."""

from collections.abc import AsyncIterator
from typing import Protocol

from runtime.core.messages import Event, Reply


class DraftLink(Protocol):
    """A drafter, seen from a target."""

    def speculate(self, events: AsyncIterator[Event]) -> AsyncIterator[Reply]:
        """Turn the events of all sessions into guesses, for as long as `events` goes on.

        The replies come when they come: none is owed for any event. Ends when `events` ends or the caller closes the
        iterator; after that the drafter holds nothing of these sessions. Raises LinkLost where the drafter is gone or
        breaks the protocol.
        """
        ...
