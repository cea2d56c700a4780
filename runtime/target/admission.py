"""Admits sessions while KV memory lasts.

KV memory is a budget of slots, one per token. Requests that do not fit wait in order of arrival.
"""

import math
from collections import deque

from runtime.core import limits
from runtime.core.errors import InvalidRequest
from runtime.core.messages import Request
from runtime.target.commands import AddRequest


def slots_needed(request: Request, context: int, feature_slots: float = 0.0) -> int:
    """Return the most slots that a session can need: its longest text plus the rows of one step.

    The features of a token take the memory of `feature_slots` slots.
    """
    longest = min(context, len(request.prompt) + request.sampling.max_tokens)
    return longest + limits.STEP_ROWS + math.ceil(longest * feature_slots)


class Admission:
    """Admits first come, first served: nobody overtakes, so nobody starves.

    feature_slots  slots whose memory the features of one token take; 0 if nobody asks for features
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.feature_slots = budget, 0.0
        self.reserved = 0
        self.waiting: deque[AddRequest] = deque()

    def check(self, request: Request, context: int) -> None:
        """Raise InvalidRequest for a request that would not fit even an idle target."""
        if (need := slots_needed(request, context, self.feature_slots)) > self.budget:
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
        need = slots_needed(self.waiting[0].request, context, self.feature_slots)
        # One that was let in before a drafter asked for features may be too large with them.
        if self.reserved and self.reserved + need > self.budget:
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
