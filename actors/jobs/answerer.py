"""The interface of what answers the items of jobs: a deployment, or a gateway over HTTP."""

from typing import Protocol

from actors.jobs.items import Answer, Item


class Answerer(Protocol):
    async def answer(self, item: Item) -> Answer:
        """Returns the answer to an item, which may be an error of the item itself.

        Raises Overloaded or Unavailable if the same item may succeed later, and another
        OutriderError if no item will. Cancelling the call frees what the item holds.
        """
