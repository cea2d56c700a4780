"""Plans and times the next step: what to verify, or how long to wait for growth first."""

from collections.abc import Sequence

from runtime.core.clock import Clock
from runtime.schedulers.base import Plan, Scheduler
from runtime.target.batch import Batch, BatchItem, pack
from runtime.target.drafter_manager import DrafterManager
from runtime.target.head_runner import HeadRunner
from runtime.target.request_state import RequestState


class StepPlanner:
    """Owns the upcoming step from the first question about it until its batch is made."""

    def __init__(self, drafters: DrafterManager, heads: HeadRunner, clock: Clock) -> None:
        self.drafters, self.heads, self.clock = drafters, heads, clock
        self.reset()

    def reset(self) -> None:
        """Start over: no step is being planned."""
        self.opened: float | None = None  # clock when its planning began
        self.waited = 0.0  # seconds
        self.pausing: float | None = None  # clock when the present wait began

    def plan(self, scheduler: Scheduler, ready: Sequence[RequestState]) -> Plan:
        """Ask the scheduler. The step's time runs from the first time it is asked.

        Guesses of heads enter the trees only when nothing is waited for: they must not keep the
        target from waiting for a drafter with better guesses.
        """
        now = self.clock()
        if self.opened is None:
            self.opened = now
        if self.pausing is not None:
            self.waited += now - self.pausing
            self.pausing = None
        self.drafters.begin(ready)
        if self.drafters.plain:
            return Plan((0,) * len(ready))
        plan = self._ask(scheduler, ready, now)
        if plan.wait == 0.0 and any(state.head_drafts for state in ready):
            plan = self._ask_with_heads(scheduler, ready, now)
        if plan.wait > 0.0:
            self.pausing = now
        return plan

    def batch(self, ready: Sequence[RequestState], plan: Plan) -> Batch:
        """Make the batch of a plan without a wait. The next step begins after it."""
        self.drafters.record_leads(ready)
        self.heads.activate()
        items = [self._item(state, rows) for state, rows in zip(ready, plan.rows, strict=True)]
        now = self.clock()
        batch = Batch(items, now if self.opened is None else self.opened, self.waited, now)
        self.opened, self.waited = None, 0.0
        return batch

    def _ask(self, scheduler: Scheduler, ready: Sequence[RequestState], now: float) -> Plan:
        views = [
            state.view(now, self.waited, len(self.drafters.active(state.session)))
            for state in ready
        ]
        return scheduler.plan(views)

    def _ask_with_heads(
        self, scheduler: Scheduler, ready: Sequence[RequestState], now: float
    ) -> Plan:
        began, heads = self.clock(), set[str]()
        for state in ready:
            for draft in state.head_drafts:
                heads.add(draft.drafter)
                self.drafters.merge(state, draft.drafter, [draft])
            state.head_drafts.clear()
        plan = self._ask(scheduler, ready, now)
        self.drafters.utility.charge(heads, self.clock() - began)
        return plan

    def _item(self, state: RequestState, rows: int) -> BatchItem:
        session = state.session
        nodes = session.select(rows)
        part = pack(session, state.cache, nodes)
        part = self.heads.with_branch_rows(session, nodes, part)
        credited = self.drafters.credited_to(session.tree, nodes)
        return BatchItem(state, nodes, credited, part, session.expected_accepted(nodes))
