"""The target's loop: merges drafts, verifies the best nodes of all trees in one pass, commits, and
notifies drafters; it waits only when waiting pays.

It runs on the model's thread and uses no event loop: input comes from a queue, output goes to
callables. Only `decide` may take long, so a simulator can put a virtual clock around it.
"""

import queue
from collections.abc import Mapping, Sequence

from runtime.core.clock import Clock
from runtime.core.messages import Chunk, Draft, FeatureRequest, Resync
from runtime.models.base import Model
from runtime.schedulers.base import Scheduler
from runtime.scoring.calibration import Calibrations
from runtime.scoring.drafter_utility import DrafterUtility
from runtime.target.batch import Batch
from runtime.target.chunked_prefill import prefill_next
from runtime.target.commands import (
    AddRequest,
    Cancel,
    Command,
    Join,
    Leave,
    ReplyReceived,
    Send,
    SetScheduler,
    StandbyOver,
    StandbyReceived,
    Stop,
)
from runtime.target.committer import Committer
from runtime.target.drafter_manager import DrafterManager
from runtime.target.feature_sender import row_bytes
from runtime.target.head_runner import HeadRunner, MountedHead
from runtime.target.inbox import GrowthReceived, drain
from runtime.target.model_runner import ModelRunner
from runtime.target.request_manager import RequestManager
from runtime.target.step_planner import StepPlanner
from runtime.target.verifier import Decision, Verifier
from runtime.telemetry.metrics import TargetMetrics
from runtime.telemetry.reports import TargetReport
from runtime.telemetry.tracing import NO_TRACE, PREFILL, TARGET, Trace

KV_SLOTS = 1 << 20  # default


class Engine:
    """Serves requests with one model and any number of drafters.

    `run` belongs to one thread; any thread may put commands into `inbox`.
    """

    def __init__(
        self,
        model: Model,
        verifier: Verifier,
        scheduler: Scheduler,
        clock: Clock,
        *,
        kv_slots: int = KV_SLOTS,
        calibrations: Calibrations | None = None,
        heads: Mapping[str, MountedHead] | None = None,
        trace: Trace = NO_TRACE,
    ) -> None:
        self.model, self.scheduler, self.clock, self.trace = model, scheduler, clock, trace
        self.inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.metrics, utility = TargetMetrics(), DrafterUtility()
        self.heads = HeadRunner(model, heads or {}, utility, self.metrics, clock)
        self.drafter_manager = DrafterManager(self.metrics, utility, self.heads.selected)
        self.drafter_manager.features.of_heads = self.heads.feature_layers
        self.requests = RequestManager(
            model,
            self.drafter_manager,
            self.heads,
            self.metrics,
            clock,
            kv_slots,
            calibrations or Calibrations(),
        )
        self.drafter_manager.set_gate(scheduler.gate, ())
        self.planner = StepPlanner(self.drafter_manager, self.heads, clock)
        self.runner = ModelRunner(self.heads, verifier, self.metrics, self.drafter_manager.features)
        self.committer = Committer(
            self.requests, self.drafter_manager, self.heads, self.metrics, clock
        )
        self.over = False  # `run` has ended

    def run(self) -> None:
        """Serve until Stop. Remaining sessions end as cancelled, also when the thread ends by an
        error.
        """
        wait: float | None = None
        try:
            while self.receive(wait):
                wait = self.step()
                if not wait or self.requests.has_changed:
                    self.requests.publish()
        finally:
            self.over = True
            self.requests.abort_all(self._never_taken_in())
            self.requests.publish()

    def step(self) -> float | None:
        """Prefill and verify once.

        Returns the seconds to wait for the inbox before the next step; None: until something
        arrives.
        """
        batch = self.schedule()
        if not isinstance(batch, Batch):
            return batch
        decisions = self.decide(batch)
        decided = self.clock()
        # Nodes guessed during the pass hang on the old root. Merged before the root moves, they
        # may include the new one.
        if not self.receive(0.0):
            self.inbox.put(Stop())
        self.commit(batch, decisions, decided)
        if not self.requests.idle and len(self.requests.ready()) == len(self.requests.running):
            self.requests.read_standby()
        return self.idle()

    def schedule(self) -> Batch | float | None:
        """Begin sessions, prefill, and plan: a batch to verify, or the seconds to wait."""
        self.requests.start(self.scheduler.style)
        self.prefill()
        ready = self.requests.ready()
        if not ready:
            self.planner.reset()
            return self.idle()
        plan = self.planner.plan(self.scheduler, ready)
        if plan.wait <= 0.0:
            return self.planner.batch(ready, plan)
        all_ready = len(ready) == len(self.requests.running)
        return self.requests.until_deadline(plan.wait) if all_ready else 0.0

    def idle(self) -> float | None:
        """Return the seconds to wait for the inbox, after reading texts of other targets if there
        is nothing else to do.
        """
        return None if self.requests.idle and not self.requests.read_standby() else 0.0

    def prefill(self) -> None:
        """Prefill prompts up to their last token, which is the root row of the first step."""
        states = self.requests.states()
        if all(state.ready for state in states):
            return
        began = self.clock()
        self.drafter_manager.features.next_step()
        found = prefill_next(
            self.model,
            self.requests.prefixes,
            self.requests.standby,
            self.drafter_manager,
            states,
            self.runner.verifier.score,
            began,
            self.clock,
        )
        for state, logprobs in found.scored:
            state.admitted.deliver(Chunk((), (), (), prompt_logprobs=logprobs))
        for state, error in found.failed:
            self.requests.fail(state, error)
        for state in states:
            only_read = state.session.request.sampling.max_tokens == 0
            if only_read and state.ready and self.requests.is_running(state):
                last = Chunk((), (), (), "length", state.stats(self.clock()))
                self.requests.finish(state, last)
        self.metrics.prefilled += found.done - began
        self.metrics.reused += found.reused
        self.trace.span(TARGET, PREFILL, began, found.done, rows=found.rows)

    def decide(self, batch: Batch) -> list[Decision | None]:
        """Run the pass. A session that fails in it ends, and its decision is None."""
        outcomes = self.runner.run(batch)
        for item, outcome in zip(batch.items, outcomes, strict=True):
            if isinstance(outcome, Exception):
                self.requests.fail(item.state, outcome)
        return [None if isinstance(outcome, Exception) else outcome for outcome in outcomes]

    def commit(self, batch: Batch, decisions: Sequence[Decision | None], decided: float) -> None:
        """Commit decisions that were made at `decided` on the clock."""
        self.drafter_manager.features.next_step()
        self.committer.commit(batch, decisions, decided, self.scheduler, self.trace)

    def receive(self, wait: float | None) -> bool:
        """Handle all messages, waiting at most `wait` seconds for the first; False after Stop."""
        for arrived in drain(self.inbox, wait):
            if isinstance(arrived, Stop):
                return False
            self.handle(arrived)
        return True

    def handle(self, arrived: Command | GrowthReceived) -> None:
        match arrived:
            case GrowthReceived():
                self.merge(arrived)
            case ReplyReceived(reply=Draft(session=name, drafter=drafter) as draft, at=at):
                self.merge(GrowthReceived(name, drafter, [(draft, at)]))
            case ReplyReceived(reply=Resync(session=name, drafter=drafter)):
                if (state := self.requests.running.get(name)) is not None:
                    self.drafter_manager.reopen(state, drafter)
            case ReplyReceived(reply=FeatureRequest(spec=spec, drafter=drafter)):
                self.drafter_manager.ask_features(drafter, spec, self.requests.states())
                layers = self.drafter_manager.features.layers
                self.requests.count_features(row_bytes(self.model, layers))
            case AddRequest():
                self.requests.add(arrived, self.scheduler.style)
            case Cancel(session=name):
                self.requests.abort(name, "cancelled")
            case Join(drafter=name, send=send, strike=strike):
                self.drafter_manager.join(name, send, self.requests.states(), strike)
            case Leave(drafter=name, send=send):
                self.drafter_manager.leave(name, send, self.requests.states())
                if not self.drafter_manager.features.specs:
                    self.requests.admission.feature_slots = 0.0
            case StandbyReceived(source=source, texts=texts):
                for text in texts:
                    self.requests.standby.update(source, text)
                self.requests.note_standby()
            case StandbyOver(source=source):
                self.requests.standby.forget(source)
                self.requests.note_standby()
            case SetScheduler(scheduler=scheduler, heads=heads):
                self.scheduler = scheduler
                self.heads.select(heads)
                self.drafter_manager.set_gate(scheduler.gate, self.requests.states())

    def merge(self, growth: GrowthReceived) -> None:
        """Merge a drafter's growth into its session's tree and report its arrival to the
        scheduler.
        """
        state = self.requests.running.get(growth.session)
        drafts = [draft for draft, _ in growth.drafts]
        if not self.drafter_manager.merge(state, growth.drafter, drafts) or state is None:
            return
        for draft, at in growth.drafts:
            if (seconds := state.round_trip(draft, at)) is not None:
                self.metrics.guesses[growth.drafter].answered(seconds)
            delay, first = state.record_growth(at)
            if state.ready:
                self.scheduler.on_growth(delay, first, leaves=len(set(draft.parents.tolist())))
            self.trace.taken(draft, at, TARGET)

    @property
    def drafters(self) -> Mapping[str, Send]:
        """Return the drafters that are present."""
        return self.drafter_manager.sends

    def report(self) -> TargetReport:
        """Return the report of the last step, or of the last session to begin or end.
        Thread-safe.
        """
        return self.requests.report

    def _never_taken_in(self) -> list[AddRequest]:
        found = []
        while not self.inbox.empty():
            if isinstance(arrived := self.inbox.get(), AddRequest):
                found.append(arrived)
        return found
