"""The target's loop: take in growth, verify the best of all trees in one pass, commit, tell the drafters; never wait for a network by rule.

It runs on the model's thread and knows no event loop: what comes in is a queue, what goes out are callables. Everything
that may take long is `compute`, so that a simulator can put a virtual clock around it.
"""

import math
import queue
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

from runtime.calibration import Calibrations
from runtime.choice import Chooser, Scorer, logprobs
from runtime.clock import Clock
from runtime.heads.base import Head
from runtime.kv.prefixes import Prefixes
from runtime.messages import Chunk, Close, Commit, Draft, FinishReason, Resync, Round
from runtime.metrics import Ledger, Tally
from runtime.models.base import Model, Part, Shown
from runtime.reports import TargetReport
from runtime.schedulers.base import Plan, Scheduler, View
from runtime.session import Session
from runtime.target.admission import Admission
from runtime.target.batch import Batch, pack, unpack
from runtime.target.chunked_prefill import FAILURES, prefill_next
from runtime.target.commands import Cancel, Command, Join, Leave, ReplyReceived, Send, SetScheduler, Stop
from runtime.target.drafter_manager import DrafterManager
from runtime.target.head_runner import HeadRunner, seen_by
from runtime.target.request_state import AddRequest, RequestState
from runtime.target.verifier import Decision, Verifier
from runtime.tracing import NODES, OFF, PREFILL, STEP, TARGET, Trace

Told = tuple[Commit, tuple[str, ...], bool]  # what was decided of a session, who had guessed each token, whether it was a hit


class Engine:
    """Sessions, drafters and the one model that decides. `run` belongs to one thread; `inbox` may be filled from any."""

    def __init__(
        self,
        model: Model,
        chooser: Chooser,
        scheduler: Scheduler,
        eos: frozenset[int],
        clock: Clock,
        kv_slots: int = 1 << 20,
        calibrations: Calibrations | None = None,
        trace: Trace = OFF,
        scorer: Scorer = logprobs,
        heads: Mapping[str, Head] | None = None,
        prices: Mapping[str, float] | None = None,
    ) -> None:
        self.model, self.scheduler, self.eos, self.clock, self.trace = model, scheduler, eos, clock, trace
        self.decider = Verifier(chooser, scorer, eos)
        self.inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.admission = Admission(kv_slots - kv_slots // 4)
        self.prefixes = Prefixes(kv_slots // 4)
        self.live: dict[str, RequestState] = {}
        self.ledger = Ledger()
        self.heads = HeadRunner(model, heads or {}, self.ledger, prices)
        self.drafter_manager = DrafterManager(self.ledger, self.heads.heads)
        self.calibrations = calibrations or Calibrations()
        self.soonest = math.inf  # clock when the first deadline ends
        self.over = False  # `run` has ended: nobody answers any more
        self.kv_slots, self.kv_kept = kv_slots, 0  # the latter hold finished texts
        self.published = self.ledger.report(0, 0, 0, kv_slots, ())
        self.opened: float | None = None  # clock when the planning of the next step began
        self.waited = 0.0  # seconds, for the next step
        self.pausing: float | None = None  # clock when the present wait began

    # The loop

    def run(self) -> None:
        """Until Stop. Sessions still under way or waiting then, or when the thread ends by a fault, end as cancelled."""
        wait: float | None = None
        try:
            while self.take_in(wait):
                wait = self.advance()
                if not wait or self.published.live != len(self.live) or self.published.waiting != len(self.admission.waiting):
                    self.publish()
        finally:
            self.over = True
            while not self.inbox.empty():
                if isinstance(arrived := self.inbox.get(), AddRequest):
                    self.admission.waiting.append(arrived)
            for name in [*self.live, *(admitted.request.session for admitted in self.admission.waiting)]:
                self.drop(name, "cancelled")
            self.publish()

    @property
    def drafters(self) -> Mapping[str, Send]:
        """Those that are there now."""
        return self.drafter_manager.sends

    def report(self) -> TargetReport:
        """As of the last step, or of the last session that has come or gone. From any thread."""
        return self.published

    def publish(self) -> None:
        used, resting = self.admission.reserved + self.kv_kept, self.drafter_manager.utility.resting
        self.published = self.ledger.report(len(self.live), len(self.admission.waiting), used, self.kv_slots, resting)

    def advance(self) -> float | None:
        """One piece of prompt and one step; returns how long to wait for the inbox before the next (None: until it has something)."""
        self.begin()
        self.prefill()
        ready = [live for live in self.live.values() if live.ready]
        if not ready:
            self.opened, self.pausing, self.waited = None, None, 0.0
            return self.idle()
        plan = self.plan(ready)
        if plan.wait > 0.0:
            return 0.0 if len(ready) < len(self.live) else self.within(plan.wait)
        step = self.pack(ready, plan)
        decisions = self.compute(step)
        decided = self.clock()
        # What was guessed during the pass hangs on the old root: taken in before the root moves, it may hold the new one.
        if not self.take_in(0.0):
            self.inbox.put(Stop())
        self.commit(step, decisions, decided)
        return self.idle()

    def idle(self) -> float | None:
        return 0.0 if self.live or self.admission.waiting else None

    def within(self, wait: float) -> float:
        """A wait that no deadline ends in."""
        return wait if self.soonest == math.inf else min(wait, max(0.0, self.soonest - self.clock()))

    def take_in(self, wait: float | None) -> bool:
        """Handle all that has arrived, waiting so long for the first of it; False once Stop was there.

        What arrives meanwhile is left for the next time: a drafter that floods the target does not keep it from its steps.
        """
        try:
            arrived = self.inbox.get(wait != 0.0, wait or None)
        except queue.Empty:
            return True
        growth: dict[tuple[str, str], list[ReplyReceived]] = {}  # by session and drafter: merging it at once costs a third
        for left in range(self.inbox.qsize(), -1, -1):
            match arrived:
                case Stop():
                    return False
                case ReplyReceived(reply=Draft(session=name, drafter=drafter)):
                    growth.setdefault((name, drafter), []).append(arrived)
                case _:
                    self.handle(arrived)
            if left:
                arrived = self.inbox.get()
        for (name, drafter), heard in growth.items():
            self.grow(name, drafter, heard)
        return True

    def handle(self, arrived: Command) -> None:
        match arrived:
            case ReplyReceived(reply=Draft(session=name, drafter=drafter)):
                self.grow(name, drafter, [arrived])
            case ReplyReceived(reply=Resync(session=name, drafter=drafter)):
                if (live := self.live.get(name)) is not None:
                    self.drafter_manager.open_again(live, drafter)
            case AddRequest():
                self.admission.waiting.append(arrived)
                self.soonest = min(self.soonest, arrived.expires)
                self.begin()
            case Cancel(session=name):
                self.drop(name, "cancelled")
            case Join(drafter=name, send=send, strike=strike):
                self.drafter_manager.join(name, send, self.live.values(), strike)
            case Leave(drafter=name, send=send):
                self.drafter_manager.leave(name, send, self.live.values())
            case SetScheduler(scheduler=scheduler, heads=heads):
                self.scheduler = scheduler
                self.heads.use(self.heads.built if heads is None else heads)
                self.drafter_manager.reset_utility(self.live.values())

    # Sessions come and go

    def begin(self) -> None:
        """Admit those for whom there is room now. Whose deadline is over ends, and does not begin."""
        self.expire()
        while (admitted := self.admission.next(len(self.live), self.model.context)) is not None:
            asked, slots = admitted
            request, now = asked.request, self.clock()
            band = self.calibrations.band(request.sampling.temperature)
            session = Session(request, self.model.vocabulary, self.model.context, band, style=self.scheduler.style)
            self.live[session.id] = RequestState(session, self.model.new_cache(), asked, slots, committed_at=now, growth_at=now)
            self.ledger.prompt += session.prompt
            self.drafter_manager.open(session)

    def end(self, live: RequestState, last: Chunk) -> None:
        """Forget the session everywhere, then say so. What it has computed is kept for texts that begin alike."""
        del self.live[live.session.id]
        self.admission.release(live.slots)
        length = min(live.cache.length, len(live.session.tokens) - 1)
        self.prefixes.keep(live.session.tokens[:length], live.cache)
        self.kv_kept = self.prefixes.slots
        self.ledger.dropped += len(live.session.tree) - 1
        self.drafter_manager.tell(live.session, Close(live.session.id))
        self.heads.close(live.session.id)
        self.answer(live.admitted, last)

    def answer(self, admitted: AddRequest, last: Chunk) -> None:
        """The last a caller hears. What it counts for is published before: who has waited for it finds it in the report."""
        if last.finish_reason is not None:
            self.ledger.finished[last.finish_reason] += 1
        self.publish()
        admitted.deliver(last)

    def drop(self, name: str, reason: FinishReason) -> None:
        """End a session as it is, whether it is under way or waits; no error where there is none of that name."""
        live, waiting = self.live.get(name), self.admission.withdraw(name)
        if live is not None:
            self.end(live, Chunk((), (), (), reason, live.stats(self.clock())))
        elif waiting is not None:
            stats = Tally().stats(len(waiting.request.prompt), 0, 0, {}, {}, 0.0, self.clock() - waiting.asked)
            self.answer(waiting, Chunk((), (), (), reason, stats))

    def expire(self) -> None:
        """End what nobody wants any more."""
        if self.soonest == math.inf or (now := self.clock()) < self.soonest:
            return
        everyone = [*(live.admitted for live in self.live.values()), *self.admission.waiting]
        for admitted in everyone:
            if admitted.expires <= now:
                self.drop(admitted.request.session, "deadline")
        self.soonest = min((admitted.expires for admitted in everyone if admitted.expires > now), default=math.inf)

    def fail(self, live: RequestState, error: Exception) -> None:
        self.end(live, Chunk((), (), (), "error", live.stats(self.clock()), error=f"{type(error).__name__}: {error}"))

    def under_way(self, live: RequestState) -> bool:
        """False once the session is over, even where another one of its name has begun."""
        return self.live.get(live.session.id) is live

    def grow(self, session: str, drafter: str, heard: Sequence[ReplyReceived]) -> None:
        live, drafts = self.live.get(session), [(one.reply, one.at) for one in heard if isinstance(one.reply, Draft)]
        if not self.drafter_manager.heard(live, drafter, [draft for draft, _ in drafts]) or live is None:
            return
        for draft, at in drafts:
            if (seconds := live.round_trip(draft, at)) is not None:
                self.ledger.guesses[drafter].answered(seconds)
            delay, first = live.grown(at)
            if live.ready:
                self.scheduler.on_growth(delay, first, leaves=len(set(draft.parents.tolist())))
            self.trace.taken(draft, at, TARGET)

    # One step

    def prefill(self) -> None:
        """Read on in the prompts that are not in the cache yet: all but the last token of each, the root row of its first step."""
        if all(live.ready for live in self.live.values()):
            return
        began = self.clock()
        found = prefill_next(self.model, self.prefixes, list(self.live.values()), began, self.clock)
        for live, error in found.failed:
            self.fail(live, error)
        self.ledger.prefilled += found.done - began
        self.ledger.reused += found.reused
        self.trace.span(TARGET, PREFILL, began, found.done, rows=found.rows)

    def plan(self, ready: Sequence[RequestState]) -> Plan:
        """What the scheduler says; the clock runs for the next step from the first time it is asked."""
        now = self.clock()
        if self.opened is None:
            self.opened = now
        if self.pausing is not None:
            self.waited += now - self.pausing
            self.pausing = None
        plan = self.scheduler.plan(self.views(ready, now))
        if plan.wait == 0.0 and any(live.sprouts for live in ready):
            plan = self.sprout(ready, now)
        if plan.wait > 0.0:
            self.pausing = now
        return plan

    def views(self, ready: Sequence[RequestState], now: float) -> list[View]:
        return [live.view(now, self.waited, len(self.drafter_manager.active(live.session))) for live in ready]

    def sprout(self, ready: Sequence[RequestState], now: float) -> Plan:
        """A new plan, with what the heads have guessed. Only here does it come into the mirrors: it must not keep the target from waiting
        for somebody who knows better."""
        began, heads = self.clock(), {draft.drafter for live in ready for draft in live.sprouts}
        for live in ready:
            for draft in live.sprouts:
                self.drafter_manager.heard(live, draft.drafter, [draft])
            live.sprouts.clear()
        plan = self.scheduler.plan(self.views(ready, now))
        self.drafter_manager.spend(heads, self.clock() - began)
        return plan

    def pack(self, ready: Sequence[RequestState], plan: Plan) -> Batch:
        self.drafter_manager.note(ready)
        nodes = [live.session.select(rows) for live, rows in zip(ready, plan.rows, strict=True)]
        parts = [pack(live.session, live.cache, chosen) for live, chosen in zip(ready, nodes, strict=True)]
        self.heads.activate(self.drafter_manager.active_heads())
        riding = [self.heads.riding(*of_one) for of_one in zip(ready, nodes, parts, strict=True)]
        owed = [self.drafter_manager.credited_to(live.session.tree, chosen) for live, chosen in zip(ready, nodes, strict=True)]
        now = self.clock()
        step = Batch(list(ready), nodes, owed, riding, now if self.opened is None else self.opened, self.waited, now)
        self.opened, self.waited = None, 0.0
        return step

    def compute(self, step: Batch) -> list[Decision | None]:
        """What the target decides for each session; None where its part of the pass failed."""
        for name, seconds in self.heads.riding_time(step.parts).items():
            self.drafter_manager.spend({name}, seconds)
        try:
            shown = self.heads.forward(step.parts)
        except FAILURES:
            self.ledger.fallbacks["alone"] += 1
            return [self.compute_alone(*of_one) for of_one in zip(step.sessions, step.nodes, step.parts, strict=True)]
        return [self.decide(*of_one) for of_one in zip(step.sessions, step.nodes, shown, strict=True)]

    def compute_alone(self, live: RequestState, nodes: list[int], part: Part) -> Decision | None:
        """What fails ends its own session and no other."""
        try:
            (shown,) = self.heads.forward([part])
        except FAILURES as error:
            self.fail(live, error)
            return None
        return self.decide(live, nodes, shown)

    def decide(self, live: RequestState, nodes: list[int], shown: Shown) -> Decision | None:
        try:
            return self.decider.decide(live.session, live.admitted.guide, nodes, shown)
        except FAILURES as error:
            self.fail(live, error)
            return None

    def commit(self, step: Batch, decisions: Sequence[Decision | None], decided: float) -> None:
        """Move the roots and tell the drafters at once, so that they go on; then roll the caches back and hand the tokens out."""
        told = [self.tell(*of_one) for of_one in zip(step.sessions, decisions, strict=True)]
        rounds, chunks, thanks, ridden = [], [], list[str](), sum(self.heads.riding_time(step.parts).values())
        for live, nodes, owed, decision, one in zip(step.sessions, step.nodes, step.owed, decisions, told, strict=True):
            if one is None or decision is None:
                continue
            path, (commit, guessed, hit) = decision.verdict.path, one
            thanks += [owed[nodes.index(node)] for node in path]
            try:
                unpack(live.cache, commit.base - 1, nodes, path)
                chunk = live.hand_out(commit, guessed, decision.logprobs)
            except FAILURES as error:
                live.cache.truncate(min(live.cache.length, commit.base - 1))  # what is behind is in no order
                self.fail(live, error)
                continue
            chunks.append((live, chunk))
            number = len(live.tally.rounds)
            rounds.append(Round(live.session.id, number, len(nodes), len(path), hit, step.waited, decided - step.began, 0.0, ridden))
        if any(one is not None and live.session.request.speculation for live, one in zip(step.sessions, told, strict=True)):
            self.drafter_manager.update_resting(thanks, self.live.values())
        if self.heads.active:
            self.guess(step, decisions, {live.session.id for live, chunk in chunks if chunk.finish_reason is None})
        done = self.clock()
        bookkeeping = max(0.0, step.began - step.opened - step.waited) + done - decided
        rounds = [replace(round_, bookkeeping=bookkeeping) for round_ in rounds]
        self.scheduler.observe(rounds)
        self.ledger.step(rounds)
        for (live, chunk), round_ in zip(chunks, rounds, strict=True):
            live.committed(round_, decided)
            self.ledger.delivered(chunk.drafters)
        for live, chunk in chunks:
            if chunk.finish_reason is None:
                live.admitted.deliver(chunk)
            else:
                self.end(live, replace(chunk, stats=live.stats(self.clock())))
        self.trace.step(step, rounds, decided, done)
        self.trace.count(NODES, decided, sum(len(live.session.tree) - 1 for live in step.sessions))

    def guess(self, step: Batch, decisions: Sequence[Decision | None], going: Container[str]) -> None:
        """The heads guess from the new roots of the sessions that go on; `sprout` makes use of it."""
        seen = seen_by(zip(step.sessions, step.nodes, step.parts, decisions, strict=True), going)
        for name in tuple(self.heads.active) if seen else ():
            began = self.clock()
            for live, draft in self.heads.propose(name, seen):
                live.sprouts.append(draft)
            ended = self.clock()
            self.drafter_manager.spend({name}, ended - began)
            self.trace.span(name, STEP, began, ended, sessions=len(seen))

    def tell(self, live: RequestState, decision: Decision | None) -> Told | None:
        """What was decided, and who had guessed each token of it ("": nobody); None for a session that is over."""
        if decision is None or not self.under_way(live):
            return None
        session, verdict = live.session, decision.verdict
        guessed, nodes = (*(session.tree.drafter[node] for node in verdict.path), ""), len(session.tree)
        commit, hit = session.apply(verdict)
        self.ledger.dropped += nodes - len(session.tree)
        self.drafter_manager.tell(session, commit)
        self.trace.sent(commit, self.clock(), TARGET)
        return commit, guessed, hit
