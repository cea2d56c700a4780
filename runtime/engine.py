"""The target's loop: take in growth, verify the best of each tree, commit, tell the drafters; never wait for a network by rule.

It runs on the model's thread and knows no event loop: what comes in is a queue, what goes out are callables.
"""

import queue
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from runtime.calibration import Calibration
from runtime.choice import Ask, Chooser
from runtime.clock import Clock
from runtime.errors import OutriderError
from runtime.finish import Finish
from runtime.kv.base import KVCache
from runtime.messages import Chunk, Close, Commit, Draft, Event, Reply, Request, Resync, Round, Share, Stats
from runtime.metrics import Tally
from runtime.models.base import Model, Rows
from runtime.models.prefill import prefill
from runtime.schedulers.base import Scheduler, View
from runtime.session import Session
from runtime.verify import Verdict, match

Send = Callable[[Event], None]
Deliver = Callable[[Chunk], None]


@dataclass(frozen=True, slots=True)
class Admit:
    request: Request
    finish: Finish
    deliver: Deliver


@dataclass(frozen=True, slots=True)
class Cancel:
    session: str


@dataclass(frozen=True, slots=True)
class Join:
    drafter: str
    send: Send


@dataclass(frozen=True, slots=True)
class Leave:
    drafter: str
    send: Send  # as at Join: who has joined under the same name since then stays


@dataclass(frozen=True, slots=True)
class Stop:
    pass


Input = Admit | Cancel | Join | Leave | Reply | Stop


@dataclass(slots=True)
class Live:
    """A session under way, with what belongs to it on this device."""

    session: Session
    cache: KVCache
    finish: Finish
    deliver: Deliver
    started: float
    tally: Tally = field(default_factory=Tally)
    prefilled: float = 0.0  # seconds that the prompt took; 0 until it is in the cache
    committed_at: float = 0.0
    hit: bool = False
    accepted: Counter[str] = field(default_factory=Counter)  # delivered tokens by the drafter that guessed them
    grown: bool = False  # growth has arrived since the last commit


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one step: seconds waited and computed, and the clock when the choice was known."""

    waited: float
    computed: float
    decided: float


class Engine:
    """Sessions, drafters and the one model that decides. `run` belongs to one thread; `inbox` may be filled from any."""

    def __init__(self, model: Model, chooser: Chooser, scheduler: Scheduler, eos: frozenset[int], clock: Clock) -> None:
        self.model, self.chooser, self.scheduler, self.eos, self.clock = model, chooser, scheduler, eos, clock
        self.inbox: queue.SimpleQueue[Input] = queue.SimpleQueue()
        self.live: dict[str, Live] = {}
        self.drafters: dict[str, Send] = {}
        self.calibrations: dict[float, Calibration] = {}
        self.unknown = 0  # drafts for sessions that are over or want none

    def run(self) -> None:
        """Until Stop. Sessions still under way then, or when the thread ends by a fault, end as cancelled."""
        try:
            while self.take_in(block=not self.live):
                for live in tuple(self.live.values()):
                    self.advance(live)
        finally:
            for live in tuple(self.live.values()):
                self.end(live, Chunk((), (), (), "cancelled", self.stats(live)))

    def take_in(self, block: bool, timeout: float | None = None) -> bool:
        """Handle all that has arrived, waiting for the first of it if asked to; False once Stop was there.

        What arrives meanwhile is left for the next time: a drafter that floods the target does not keep it from its steps.
        """
        try:
            first = self.inbox.get(block, timeout)
        except queue.Empty:
            return True
        for arrived in [first, *(self.inbox.get() for _ in range(self.inbox.qsize()))]:
            if isinstance(arrived, Stop):
                return False
            self.handle(arrived)
        return True

    def handle(self, arrived: Input) -> None:
        match arrived:
            case Draft(session=name):
                self.grow(name, arrived)
            case Admit():
                self.admit(arrived)
            case Cancel(session=name):
                if name in self.live:
                    self.end(self.live[name], Chunk((), (), (), "cancelled", self.stats(self.live[name])))
            case Join(drafter=name, send=send):
                self.drafters[name] = send
                self.share_out(joined=name)
            case Leave(drafter=name, send=send):
                if self.drafters.get(name) is send:
                    del self.drafters[name]
                    self.share_out()
            case Resync(session=name, drafter=drafter):
                live = self.live.get(name)
                if live is not None and live.session.request.speculation and drafter in self.drafters:
                    index = list(self.drafters).index(drafter)
                    self.drafters[drafter](live.session.open(Share(name, index, len(self.drafters))))
            case Stop():
                pass

    def grow(self, name: str, draft: Draft) -> None:
        live = self.live.get(name)
        if live is None or not live.session.request.speculation:
            self.unknown += 1
        elif live.session.offer(draft) and not live.grown:
            live.grown = True
            self.scheduler.grew(self.clock() - live.committed_at, live.hit)

    def admit(self, asked: Admit) -> None:
        request, now = asked.request, self.clock()
        calibration = self.calibrations.setdefault(round(request.sampling.temperature, 1), Calibration())
        session = Session(request, self.model.vocabulary, self.model.context, calibration)
        self.live[session.id] = Live(session, self.model.new_cache(), asked.finish, asked.deliver, now, committed_at=now)
        for index, send in enumerate(self.listeners(session)):
            send(session.open(Share(session.id, index, len(self.drafters))))

    def share_out(self, joined: str = "") -> None:
        """Tell every drafter its part of every session; the one that has joined learns the whole text."""
        for live in self.live.values():
            if live.session.request.speculation:
                for index, (name, send) in enumerate(self.drafters.items()):
                    share = Share(live.session.id, index, len(self.drafters))
                    send(live.session.open(share) if name == joined else share)

    def listeners(self, session: Session) -> list[Send]:
        return list(self.drafters.values()) if session.request.speculation else []

    def advance(self, live: Live) -> None:
        """One step of one session. What fails in it ends that session and no other."""
        try:
            if live.prefilled == 0.0:
                self.prefill(live)
            else:
                self.step(live)
        except (OutriderError, RuntimeError, ValueError, MemoryError) as error:
            self.end(live, Chunk((), (), (), "error", self.stats(live), error=f"{type(error).__name__}: {error}"))

    def prefill(self, live: Live) -> None:
        """Everything but the last token, which is the root row of the first step."""
        began = self.clock()
        if len(live.session.tokens) > 1:
            prefill(self.model, live.cache, np.asarray(live.session.tokens[:-1], dtype=np.int64))
        live.prefilled = max(self.clock() - began, 1e-9)

    def step(self, live: Live) -> None:
        nodes, waited = self.choose_rows(live)
        if not self.under_way(live):
            return
        began = self.clock()
        verdict = self.verify(live, nodes)
        decided = self.clock()
        # What was guessed during the pass hangs on the old root: taken in before the root moves, it may hold the new one.
        if not self.take_in(block=False):
            self.inbox.put(Stop())
        if self.under_way(live):
            self.commit(live, nodes, verdict, Timing(waited, decided - began, decided))

    def choose_rows(self, live: Live) -> tuple[list[int], float]:
        """Ask the scheduler until it says to go; with other sessions waiting for their step, patience is theirs to pay."""
        began, session = self.clock(), live.session
        while self.under_way(live):
            now = self.clock()
            drafters = len(self.listeners(session)) if session.room > 0 else 0  # nobody can help with the last token
            view = View(session.gains(), drafters, live.hit, now - began, now - live.committed_at)
            plan = self.scheduler.plan(view)
            if plan.wait <= 0.0 or len(self.live) > 1:
                return session.select(plan.rows), now - began
            before = session.drafted
            if not self.take_in(block=True, timeout=plan.wait):
                self.inbox.put(Stop())
                break
            if session.drafted == before and self.clock() - now >= plan.wait:
                return session.select(plan.rows), self.clock() - began
        return [], self.clock() - began

    def under_way(self, live: Live) -> bool:
        """False once the session is over, even where another one of its name has begun."""
        return self.live.get(live.session.id) is live

    def verify(self, live: Live, nodes: list[int]) -> Verdict:
        """One forward pass over root and nodes, and the descent along what the target chose."""
        session = live.session
        tree, prefix, n = session.tree, len(session.tokens) - 1, len(nodes) + 1
        visible = np.zeros((n, n), dtype=np.bool_)
        visible[:, 0] = True
        visible[1:, 1:] = tree.visible(nodes)
        tokens = np.asarray([tree.token[node] for node in (0, *nodes)], dtype=np.int64)
        positions = prefix + np.asarray([tree.depth[node] for node in (0, *nodes)], dtype=np.int64)
        logits = self.model.forward(live.cache, Rows(tokens, positions, prefix, visible))
        ask = Ask(session.request.sampling, session.prompt, session.tokens, session.paths(nodes), self.eos)
        return match(tree, nodes, self.chooser(logits, ask).tolist())

    def commit(self, live: Live, nodes: list[int], verdict: Verdict, timing: Timing) -> None:
        """Move the root, tell the drafters, roll the cache back to the accepted path, hand the tokens out."""
        session, prefix = live.session, len(live.session.tokens) - 1
        guessed = (*(session.tree.drafter[node] for node in verdict.path), "")
        commit, hit = session.apply(verdict)
        for send in self.listeners(session):
            send(commit)
        row_of = {node: prefix + row for row, node in enumerate(nodes, start=1)}
        live.cache.keep(prefix + 1, [row_of[node] for node in verdict.path])
        live.hit, live.grown, live.committed_at = hit, False, timing.decided
        chunk = self.hand_out(live, commit, guessed)
        number, width, accepted = len(live.tally.rounds), len(nodes), len(verdict.path)
        bookkeeping = self.clock() - timing.decided
        done = Round(session.id, number, width, accepted, hit, timing.waited, timing.computed, bookkeeping)
        live.tally.add(done)
        self.scheduler.observe(done)
        if chunk.finish_reason is None:
            live.deliver(chunk)
        else:
            self.end(live, Chunk(chunk.pieces, chunk.tokens, chunk.drafters, chunk.finish_reason, self.stats(live)))

    def hand_out(self, live: Live, commit: Commit, guessed: tuple[str, ...]) -> Chunk:
        """Tokens one by one through the finish function: what comes after the end is not handed out."""
        pieces: list[str] = []
        reason = None
        for token in commit.tokens:
            delta = live.finish.feed(token)
            pieces.append(delta.text)
            reason = delta.reason
            if reason is not None:
                break
        count = len(pieces)
        live.accepted.update(name for name in guessed[:count] if name)
        return Chunk(tuple(pieces), commit.tokens[:count], guessed[:count], reason)

    def end(self, live: Live, last: Chunk) -> None:
        """Forget the session everywhere, then say so."""
        del self.live[live.session.id]
        for send in self.listeners(live.session):
            send(Close(live.session.id))
        live.deliver(last)

    def stats(self, live: Live) -> Stats:
        session = live.session
        return live.tally.stats(
            prompt_tokens=session.prompt,
            completion_tokens=live.finish.count,
            drafted=session.drafted,
            by_drafter=live.accepted,
            ignored=session.ignored,
            prefill=live.prefilled,
            elapsed=self.clock() - live.started,
        )
