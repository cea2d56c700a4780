"""The seam between jobs and what answers them: a deployment asked directly, or any gateway over HTTP."""

from typing import Protocol

from actors.jobs.items import Answer, Item


class Answerer(Protocol):
    async def answer(self, item: Item) -> Answer:
        """Whatever is the item's own matter is its answer, errors too.

        Raises Overloaded and Unavailable where the same item may well be answered later, another OutriderError where no item will be.
        Cancelling frees what the item holds.
        """
