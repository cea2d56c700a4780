"""Runs the runtime on a virtual clock: target engines, draft engines and their messages are events.

The simulator takes no decisions. Engine, session, scheduler and draft engine are the real ones,
called in the order of their own loops. The clock advances while a model would compute or a message
would travel.
"""

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from runtime.core.messages import Event, Reply
from runtime.draft.commands import EventReceived
from runtime.draft.draft_engine import DraftEngine
from runtime.drafters.base import ExpandRequest
from runtime.target.batch import Batch
from runtime.target.commands import Command, Join, ReplyReceived
from runtime.target.engine import Engine
from runtime.target.verifier import Decision

MIN_DELAY_S = 1e-6  # a shorter delay could be lost in the rounding of the clock
PassTime = Callable[[int], float]  # seconds of a pass by its rows
# Seconds of a step by rows, sessions, messages received before it, and whether a drafter computes.
StepTime = Callable[[int, int, int, bool], float]


class Simulator:
    """A queue of future events in order of time; simultaneous events run in the order of
    scheduling.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()

    def clock(self) -> float:
        return self.now

    def call_later(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + delay, next(self.order), action))

    def step(self) -> bool:
        """Run the next event; return False if there is none."""
        if not self.events:
            return False
        self.now, _, action = heapq.heappop(self.events)
        action()
        return True


class SimulatedTarget:
    """An engine whose steps take `seconds`."""

    def __init__(self, simulator: Simulator, engine: Engine, seconds: StepTime) -> None:
        self.simulator, self.engine, self.seconds = simulator, engine, seconds
        self.drafters: list[SimulatedDrafter] = []
        self.computing = False
        self.plans = 0  # made so far: a timer set before the latest plan is obsolete

    def receive(self, arrived: Command) -> None:
        self.engine.inbox.put(arrived)
        if not self.computing:
            self.resume()

    def resume(self) -> None:
        """Do what Engine.run and the first half of Engine.step do, up to the pass. Prefill takes no
        time here.
        """
        engine = self.engine
        self.plans += 1
        messages = engine.inbox.qsize()
        engine.receive(0.0)
        engine.requests.start(engine.scheduler.style)
        while len(engine.requests.ready()) < len(engine.requests.running):
            engine.prefill()
        batch = engine.schedule()
        if not isinstance(batch, Batch):
            this = self.plans
            if batch is not None:
                self.simulator.call_later(max(batch, MIN_DELAY_S), lambda: self.wake(this))
            return
        decisions = engine.decide(batch)
        self.computing = True
        rows, busy = (
            sum(len(part.rows.tokens) for part in batch.parts),
            any(drafter.computing for drafter in self.drafters),
        )
        self.simulator.call_later(
            self.seconds(rows, len(batch.items), messages, busy),
            lambda: self.finish_step(batch, decisions),
        )

    def wake(self, plan: int) -> None:
        if plan == self.plans and not self.computing:
            self.resume()

    def finish_step(self, batch: Batch, decisions: Sequence[Decision | None]) -> None:
        """Do the second half of Engine.step."""
        self.computing = False
        self.engine.receive(0.0)
        self.engine.commit(batch, decisions, self.simulator.now)
        self.resume()


class SimulatedDrafter:
    """A draft engine whose passes take `seconds`. It serves all of its targets from one queue."""

    def __init__(self, simulator: Simulator, draft_engine: DraftEngine, seconds: PassTime) -> None:
        self.simulator, self.draft_engine, self.seconds = simulator, draft_engine, seconds
        self.computing = False
        self.served_requests = 0

    def receive(self, arrived: EventReceived) -> None:
        self.draft_engine.inbox.put(arrived)
        if not self.computing:
            self.resume()

    def resume(self) -> None:
        """Do what DraftEngine.run does, up to the method's pass."""
        self.draft_engine.receive(block=False)
        requests = self.draft_engine.plan()
        self.draft_engine.send_unsent(requests)
        if not requests:
            return
        self.computing = True
        self.served_requests += len(requests)
        rows = sum(len(request.leaves) for request in requests)
        self.simulator.call_later(self.seconds(rows), lambda: self.finish_pass(requests))

    def finish_pass(self, requests: Sequence[ExpandRequest]) -> None:
        self.computing = False
        self.draft_engine.insert_answers(requests, self.draft_engine.expand(requests))
        self.resume()

    def join(self, target: SimulatedTarget, stream: int, one_way: float) -> None:
        """Link this drafter to a target; each message takes `one_way` seconds."""
        name = self.draft_engine.name

        def reply(message: Reply) -> None:
            named = replace(message, drafter=name)
            self.simulator.call_later(
                one_way, lambda: target.receive(ReplyReceived(named, self.simulator.now))
            )

        def send(event: Event) -> None:
            self.simulator.call_later(
                one_way, lambda: self.receive(EventReceived(stream, event, reply))
            )

        target.drafters.append(self)
        target.engine.handle(Join(name, send))


def interpolate(times: dict[int, float], more: float = 0.0) -> PassTime:
    """Return a function from rows to seconds, plus `more`.

    It is linear between the measured rows and never falls; beyond them the last slope continues.
    """
    rows = np.asarray(sorted(times), dtype=np.float64)
    seconds = np.maximum.accumulate(np.asarray([times[int(n)] for n in rows]))
    slope = float((seconds[-1] - seconds[-2]) / (rows[-1] - rows[-2])) if len(rows) > 1 else 0.0

    def of(n: int) -> float:
        return more + float(np.interp(n, rows, seconds)) + max(0.0, n - float(rows[-1])) * slope

    return of
