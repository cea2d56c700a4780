"""Admits sessions while KV memory lasts.

KV memory is a budget of slots, one per token. Requests that do not fit wait in order of arrival.
"""

from collections import deque

from runtime.core import limits
from runtime.core.errors import InvalidRequest
from runtime.core.messages import Request
from runtime.target.commands import AddRequest


def slots_needed(request: Request, context: int) -> int:
    """Return the most slots that a session can need: its longest text plus the rows of one step."""
    return min(context, len(request.prompt) + request.sampling.max_tokens) + limits.STEP_ROWS


class Admission:
    """Admits first come, first served: nobody overtakes, so nobody starves."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.reserved = 0
        self.waiting: deque[AddRequest] = deque()

    def check(self, request: Request, context: int) -> None:
        """Raise InvalidRequest for a request that would not fit even an idle target."""
        if (need := slots_needed(request, context)) > self.budget:
            raise InvalidRequest(
                f"prompt of {len(request.prompt)} tokens + max_tokens "
                f"{request.sampling.max_tokens} need {need} slots of KV memory, "
                f"the target has {self.budget}: lower max_tokens, or raise the target's kv_tokens",
                "max_tokens",
            )

    def next(self, live: int, context: int) -> tuple[AddRequest, int] | None:
        """Return the next request that may begin, and the slots reserved for it.

        Returns None if nobody waits or the first request does not fit yet.
        """
        if not self.waiting or live >= limits.SESSIONS:
            return None
        need = slots_needed(self.waiting[0].request, context)
        if self.reserved + need > self.budget:
            return None
        self.reserved += need
        return self.waiting.popleft(), need

    def release(self, slots: int) -> None:
        self.reserved -= slots

    def withdraw(self, session: str) -> AddRequest | None:
        """Remove a waiting request and return it; None if it is not waiting."""
        for admitted in self.waiting:
            if admitted.request.session == session:
                self.waiting.remove(admitted)
                return admitted
        return None
