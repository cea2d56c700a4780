"""The target's loop: take in growth, verify the best of all trees in one pass, commit, tell the drafters; never wait for a network by rule.

It runs on the model's thread and knows no event loop: what comes in is a queue, what goes out are callables. Everything
that may take long is `compute`, so that a simulator can put a virtual clock around it.
"""

import queue
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from runtime import limits
from runtime.admission import Admission
from runtime.calibration import Calibrations
from runtime.choice import Ask, Chooser
from runtime.clock import Clock
from runtime.errors import OutriderError
from runtime.inputs import Cancel, Heard, Input, Join, Leave, Policy, Send, Stop
from runtime.kv.prefixes import Prefixes
from runtime.live import Admit, Live
from runtime.merit import Merit
from runtime.messages import Chunk, Close, Commit, Draft, Resync, Round, Share
from runtime.metrics import Tally
from runtime.models.base import Model, Part, causal
from runtime.packing import pack, unpack
from runtime.schedulers.base import Plan, Scheduler
from runtime.session import Session
from runtime.tracing import NODES, OFF, PREFILL, TARGET, Trace
from runtime.verify import Verdict, match

CHUNK = 512  # tokens of a prompt that are read at once
CHUNK_BESIDE = 64  # where other sessions wait for their step meanwhile

# What a request, a model or a tokenizer may raise: it ends that session. Any other error is a fault of the loop itself.
FAILURES = (OutriderError, RuntimeError, ValueError, MemoryError, LookupError, TypeError, AttributeError, ArithmeticError)


Told = tuple[Verdict, Commit, tuple[str, ...], bool]  # what was decided of a session, who had guessed each token, whether it was a hit


@dataclass(frozen=True, slots=True)
class Step:
    """One packed pass: the sessions it serves, for each the nodes that get a row; times are readings of the clock."""

    sessions: list[Live]
    nodes: list[list[int]]
    parts: list[Part]
    opened: float  # when its planning began
    waited: float  # seconds
    began: float


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
    ) -> None:
        self.model, self.chooser, self.scheduler, self.eos, self.clock, self.trace = model, chooser, scheduler, eos, clock, trace
        self.inbox: queue.SimpleQueue[Input] = queue.SimpleQueue()
        self.admission = Admission(kv_slots - kv_slots // 4)
        self.prefixes = Prefixes(kv_slots // 4)
        self.live: dict[str, Live] = {}
        self.drafters: dict[str, Send] = {}
        self.merit = Merit()
        self.calibrations = calibrations or Calibrations()
        self.over = False  # `run` has ended: nobody answers any more
        self.unknown = 0  # drafts for sessions that are over or want none
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
        finally:
            self.over = True
            while not self.inbox.empty():
                if isinstance(arrived := self.inbox.get(), Admit):
                    self.admission.waiting.append(arrived)
            for name in [*self.live, *(admitted.request.session for admitted in self.admission.waiting)]:
                self.cancel(name)

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
            return 0.0 if len(ready) < len(self.live) else plan.wait
        step = self.pack(ready, plan)
        choices = self.compute(step)
        decided = self.clock()
        # What was guessed during the pass hangs on the old root: taken in before the root moves, it may hold the new one.
        if not self.take_in(0.0):
            self.inbox.put(Stop())
        self.commit(step, choices, decided)
        return self.idle()

    def idle(self) -> float | None:
        return 0.0 if self.live or self.admission.waiting else None

    def take_in(self, wait: float | None) -> bool:
        """Handle all that has arrived, waiting so long for the first of it; False once Stop was there.

        What arrives meanwhile is left for the next time: a drafter that floods the target does not keep it from its steps.
        """
        try:
            arrived = self.inbox.get(wait != 0.0, wait or None)
        except queue.Empty:
            return True
        growth: dict[tuple[str, str], list[Heard]] = {}  # by session and drafter: merging it at once costs a third
        for left in range(self.inbox.qsize(), -1, -1):
            match arrived:
                case Stop():
                    return False
                case Heard(reply=Draft(session=name, drafter=drafter)):
                    growth.setdefault((name, drafter), []).append(arrived)
                case _:
                    self.handle(arrived)
            if left:
                arrived = self.inbox.get()
        for (name, drafter), heard in growth.items():
            self.grow(name, drafter, heard)
        return True

    def handle(self, arrived: Input) -> None:
        match arrived:
            case Heard(reply=Draft(session=name, drafter=drafter)):
                self.grow(name, drafter, [arrived])
            case Heard(reply=Resync(session=name, drafter=drafter)):
                self.open_again(name, drafter)
            case Admit():
                self.admission.waiting.append(arrived)
                self.begin()
            case Cancel(session=name):
                self.cancel(name)
            case Join(drafter=name, send=send):
                self.drafters[name] = send
                self.share_out(joined=name)
            case Leave(drafter=name, send=send):
                if self.drafters.get(name) is send:
                    del self.drafters[name]
                    self.merit.forget(name)
                    self.share_out()
            case Policy(scheduler=scheduler):
                self.scheduler, self.merit = scheduler, Merit()
                self.share_out()

    # Sessions come and go

    def begin(self) -> None:
        """Admit those for whom there is room now."""
        while (admitted := self.admission.next(len(self.live), self.model.context)) is not None:
            asked, slots = admitted
            request, now = asked.request, self.clock()
            band = self.calibrations.band(request.sampling.temperature)
            session = Session(request, self.model.vocabulary, self.model.context, band, style=self.scheduler.style)
            self.live[session.id] = Live(session, self.model.new_cache(), asked, slots, committed_at=now, growth_at=now)
            for name, send in self.listeners(session).items():
                send(session.open(self.share(session.id, name)))

    def end(self, live: Live, last: Chunk) -> None:
        """Forget the session everywhere, then say so. What it has computed is kept for texts that begin alike."""
        del self.live[live.session.id]
        self.admission.release(live.slots)
        length = min(live.cache.length, len(live.session.tokens) - 1)
        self.prefixes.keep(live.session.tokens[:length], live.cache)
        for send in self.listeners(live.session).values():
            send(Close(live.session.id))
        live.admitted.deliver(last)

    def cancel(self, name: str) -> None:
        live, waiting = self.live.get(name), self.admission.withdraw(name)
        if live is not None:
            self.end(live, Chunk((), (), (), "cancelled", live.stats(self.clock())))
        elif waiting is not None:
            prompt = len(waiting.request.prompt)
            waiting.deliver(Chunk((), (), (), "cancelled", Tally().stats(prompt, 0, 0, {}, {}, 0.0, self.clock() - waiting.asked)))

    def fail(self, live: Live, error: Exception) -> None:
        self.end(live, Chunk((), (), (), "error", live.stats(self.clock()), error=f"{type(error).__name__}: {error}"))

    def under_way(self, live: Live) -> bool:
        """False once the session is over, even where another one of its name has begun."""
        return self.live.get(live.session.id) is live

    # Drafters

    def grow(self, session: str, drafter: str, heard: Sequence[Heard]) -> None:
        live = self.live.get(session)
        if live is None or not live.session.request.speculation or drafter in self.merit.resting:
            self.unknown += len(heard)
            return
        drafts = [(one.reply, one.at) for one in heard if isinstance(one.reply, Draft)]
        if not live.session.offer(*(draft for draft, _ in drafts)):
            return
        for draft, at in drafts:
            delay, first = live.grown(at)
            if live.ready:
                self.scheduler.grew(delay, first, leaves=len(set(draft.parents.tolist())))
            self.trace.taken(draft, at, TARGET)

    def open_again(self, session: str, drafter: str) -> None:
        live = self.live.get(session)
        if live is not None and drafter in self.listeners(live.session):
            self.drafters[drafter](live.session.open(self.share(session, drafter)))

    def share_out(self, joined: str = "") -> None:
        """Tell every drafter its part of every session; the one that has joined learns the whole text."""
        for live in self.live.values():
            for name, send in self.listeners(live.session).items():
                share = self.share(live.session.id, name)
                send(live.session.open(share) if name == joined else share)

    def share(self, session: str, drafter: str) -> Share:
        sharers = self.merit.sharers(self.drafters)
        return Share(session, sharers.index(drafter), len(sharers)) if drafter in sharers else Share(session, 0, 0)

    def listeners(self, session: Session) -> dict[str, Send]:
        return self.drafters if session.request.speculation else {}

    # One step

    def prefill(self) -> None:
        """The next piece of the oldest prompt that is not in the cache yet: all but its last token, the root row of the first step."""
        live = next((live for live in self.live.values() if not live.ready), None)
        if live is None:
            return
        began, others = self.clock(), any(other.ready for other in self.live.values())
        wanted = live.session.tokens[:-1]
        try:
            if live.cache.length == 0:
                self.reuse(live)
            start = live.cache.length
            piece = np.asarray(wanted[start : start + (CHUNK_BESIDE if others else CHUNK)], dtype=np.int64)
            if len(piece):
                self.model.forward_all([Part(live.cache, causal(piece, start), last=0)])
        except FAILURES as error:
            self.fail(live, error)
            return
        live.ready = live.cache.length == len(wanted)
        done = self.clock()
        live.prefilled += done - began
        live.committed_at = live.growth_at = done
        self.trace.span(TARGET, PREFILL, began, done, rows=len(piece))

    def reuse(self, live: Live) -> None:
        """Begin with a copy of the longest beginning that some text in a cache has in common with this one."""
        others = [(other.session.tokens[:-1], other.cache) for other in self.live.values() if other.ready]
        found = self.prefixes.longest(live.session.tokens, others)
        if found is not None:
            cache, live.reused = found
            live.cache = cache.fork(live.reused)

    def plan(self, ready: Sequence[Live]) -> Plan:
        """What the scheduler says; the clock runs for the next step from the first time it is asked."""
        now = self.clock()
        if self.opened is None:
            self.opened = now
        if self.pausing is not None:
            self.waited += now - self.pausing
            self.pausing = None
        views = [live.view(now, self.waited, len(self.merit.sharers(self.listeners(live.session)))) for live in ready]
        plan = self.scheduler.plan(views)
        if plan.wait > 0.0:
            self.pausing = now
        return plan

    def pack(self, ready: Sequence[Live], plan: Plan) -> Step:
        nodes = [live.session.select(min(rows, limits.STEP_ROWS)) for live, rows in zip(ready, plan.rows, strict=True)]
        parts = [pack(live.session, live.cache, chosen) for live, chosen in zip(ready, nodes, strict=True)]
        now = self.clock()
        step = Step(list(ready), nodes, parts, now if self.opened is None else self.opened, self.waited, now)
        self.opened, self.waited = None, 0.0
        return step

    def compute(self, step: Step) -> list[list[int]]:
        """For each session what the target chooses after each of its rows; empty where its part of the pass failed."""
        try:
            logits = self.model.forward_all(step.parts)
        except FAILURES:
            return [self.compute_alone(*of_one) for of_one in zip(step.sessions, step.nodes, step.parts, strict=True)]
        return [self.choose(*of_one) for of_one in zip(step.sessions, step.nodes, logits, strict=True)]

    def compute_alone(self, live: Live, nodes: list[int], part: Part) -> list[int]:
        """What fails ends its own session and no other."""
        try:
            logits = self.model.forward_all([part])[0]
        except FAILURES as error:
            self.fail(live, error)
            return []
        return self.choose(live, nodes, logits)

    def choose(self, live: Live, nodes: list[int], logits: object) -> list[int]:
        session = live.session
        ask = Ask(session.request.sampling, session.prompt, session.tokens, session.paths(nodes), self.eos)
        try:
            chosen: list[int] = self.chooser(logits, ask).tolist()
        except FAILURES as error:
            self.fail(live, error)
            return []
        return chosen

    def commit(self, step: Step, choices: Sequence[Sequence[int]], decided: float) -> None:
        """Move the roots and tell the drafters at once, so that they go on; then roll the caches back and hand the tokens out."""
        told = [self.tell(*of_one) for of_one in zip(step.sessions, step.nodes, choices, strict=True)]
        rounds, chunks = [], []
        for live, nodes, one in zip(step.sessions, step.nodes, told, strict=True):
            if one is None:
                continue
            verdict, commit, guessed, hit = one
            try:
                unpack(live.cache, commit.base - 1, nodes, verdict.path)
                chunk = live.hand_out(commit, guessed)
            except FAILURES as error:
                live.cache.truncate(min(live.cache.length, commit.base - 1))  # what is behind is in no order
                self.fail(live, error)
                continue
            chunks.append((live, chunk))
            number, accepted = len(live.tally.rounds), len(verdict.path)
            rounds.append(Round(live.session.id, number, len(nodes), accepted, hit, step.waited, decided - step.began, 0.0))
        self.judge(step, told)
        done = self.clock()
        bookkeeping = max(0.0, step.began - step.opened - step.waited) + done - decided
        rounds = [replace(round_, bookkeeping=bookkeeping) for round_ in rounds]
        self.scheduler.observe(rounds)
        for (live, chunk), round_ in zip(chunks, rounds, strict=True):
            live.committed(round_, decided)
            if chunk.finish_reason is None:
                live.admitted.deliver(chunk)
            else:
                self.end(live, Chunk(chunk.pieces, chunk.tokens, chunk.drafters, chunk.finish_reason, live.stats(self.clock())))
        self.trace.step(step, rounds, decided, done)
        self.trace.count(NODES, decided, sum(len(live.session.tree) - 1 for live in step.sessions))

    def judge(self, step: Step, told: Sequence[Told | None]) -> None:
        """Who guessed something in this step, and who has brought nothing for long."""
        heard = any(one is not None and live.session.request.speculation for live, one in zip(step.sessions, told, strict=True))
        guessed = [name for one in told if one is not None for name in one[2]]
        if heard and self.merit.observe(self.drafters, guessed):
            self.share_out()

    def tell(self, live: Live, nodes: Sequence[int], choices: Sequence[int]) -> Told | None:
        """What was decided, and who had guessed each token of it ("": nobody); None for a session that is over."""
        if not self.under_way(live):
            return None
        session = live.session
        verdict = match(session.tree, nodes, choices)
        guessed = (*(session.tree.drafter[node] for node in verdict.path), "")
        commit, hit = session.apply(verdict)
        listeners = self.listeners(session)
        for send in listeners.values():
            send(commit)
        self.trace.sent(commit, self.clock(), TARGET)
        return verdict, commit, guessed, hit
