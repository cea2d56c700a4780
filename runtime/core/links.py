"""Defines the interface between a target and a drafter: one method, wherever the drafter runs."""

from collections.abc import AsyncIterator
from typing import Protocol

from runtime.core.messages import Event, Reply


class DraftLink(Protocol):
    """A drafter as a target sees it."""

    def speculate(self, events: AsyncIterator[Event]) -> AsyncIterator[Reply]:
        """Turn the events of all sessions into guesses until `events` ends.

        Replies come at any time; no event is owed one. The iterator ends when `events` ends or the
        caller closes it. The drafter then holds no state of these sessions. Raises LinkLost if the
        drafter is gone or violates the protocol.
        """
        ...
