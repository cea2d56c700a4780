"""Who may begin: KV memory is a budget in slots (one per token), and who does not fit waits in order of arrival."""

from collections import deque

from runtime.core import limits
from runtime.core.errors import InvalidRequest
from runtime.core.messages import Request
from runtime.target.commands import AddRequest


def slots_needed(request: Request, context: int) -> int:
    """The most slots that a session will need: its longest text, and the rows of one step behind it."""
    return min(context, len(request.prompt) + request.sampling.max_tokens) + limits.STEP_ROWS


class Admission:
    """First come, first served: nobody overtakes, so nobody starves."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.reserved = 0
        self.waiting: deque[AddRequest] = deque()

    def check(self, request: Request, context: int) -> None:
        """Raises InvalidRequest for a request that would not fit an idle target."""
        if (need := slots_needed(request, context)) > self.budget:
            raise InvalidRequest(
                f"prompt of {len(request.prompt)} tokens + max_tokens {request.sampling.max_tokens} need {need} slots of KV memory, "
                f"the target has {self.budget}: lower max_tokens, or raise the target's kv_tokens",
                "max_tokens",
            )

    def next(self, live: int, context: int) -> tuple[AddRequest, int] | None:
        """The request that may begin now and the slots reserved for it; None where nobody waits, or the first has no room yet."""
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
        """Take a waiting request back; None where it does not wait."""
        for admitted in self.waiting:
            if admitted.request.session == session:
                self.waiting.remove(admitted)
                return admitted
        return None
