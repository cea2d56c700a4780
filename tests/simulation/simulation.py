"""Runs one scenario to its end, and checks the promises after every turn."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import pytest

from actors.routing.router import Router
from actors.rpc.client import GrpcTarget
from runtime.core import limits, node_keys
from runtime.draft.draft_state import DraftState
from runtime.target.request_state import RequestState
from runtime.target.target import MAX_INBOX_MESSAGES
from tests.simulation.batch import BatchMachine
from tests.simulation.clients import Client
from tests.simulation.machines import (
    Controller,
    DrafterMachine,
    GatewayMachine,
    Machine,
    TargetMachine,
)
from tests.simulation.network import Network
from tests.simulation.scenario import HORIZON_S, NOISES, Fault, Scenario
from tests.simulation.virtual_time import FaultFoundError, ProcessLoop, World

SomeMachine = TypeVar("SomeMachine", bound=Machine)

FOLDER = "/dev/shm" if Path("/dev/shm").is_dir() else None  # memory is faster than a disk
SESSION_LIMIT_S = 60.0  # for a session without a deadline: faults last five seconds at most
# The same where the schedule is one of the baselines, which wait in each step for lost guesses.
BASELINE_LIMIT_S = 180.0
END_S = HORIZON_S + BASELINE_LIMIT_S + 1.0
ORPHAN_S = 0.5  # for a target to end a session whose caller has gone
MAX_CALLS = 40  # of a session to targets


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a scenario. `failure` is "" if all promises were kept."""

    scenario: Scenario
    failure: str
    timeline: tuple[tuple[float, str, str], ...]
    turns: int
    outcomes: dict[str, str]


def run(scenario: Scenario) -> Result:
    """Simulate a scenario."""
    with ExitStack() as files:
        simulation = Simulation(scenario, files)
        with patched(simulation):
            try:
                simulation.run()
            except FaultFoundError as error:
                simulation.world.fail(str(error))
            finally:
                failure = simulation.world.failure or ""
                simulation.world.reap()
    return Result(
        scenario,
        failure,
        tuple(simulation.world.timeline),
        simulation.world.turns,
        {client.name: client.outcome for client in simulation.clients},
    )


@contextmanager
def patched(simulation: "Simulation") -> Iterator[None]:
    """Let clients use the simulated network, and keys have few bits if the scenario says so."""
    handler = TimelineHandler(simulation.world)
    logging.getLogger().addHandler(handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("actors.rpc.client.channel", simulation.network.channel)
            patch.setattr(node_keys, "KEY_MASK", (1 << simulation.scenario.key_bits) - 1)
            yield
    finally:
        logging.getLogger().removeHandler(handler)


class TimelineHandler(logging.Handler):
    """Writes what the product logs into the timeline."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.WARNING)
        self.world = world

    def emit(self, record: logging.LogRecord) -> None:
        self.world.log(record.name, record.getMessage())


class Simulation:
    """A deployment: a gateway with a router and its clients, targets, drafters, a controller."""

    def __init__(self, scenario: Scenario, files: ExitStack) -> None:
        self.scenario = scenario
        waits = scenario.targets[0].policy not in ("living", "fixed")
        self.session_limit = BASELINE_LIMIT_S if waits else SESSION_LIMIT_S
        self.world = world = World(f"{scenario.seed}/world")
        self.network = Network(world, scenario.noise)
        host = GatewayMachine(world, self.network, self.open_gateway)
        self.gateway = host.loop
        target_faults = sum(
            "drafter" not in fault.who + fault.other and fault.who != "batch"
            for fault in scenario.faults.values()
        )
        self.clients = [
            Client(world, plan, target_faults, host.paused_since)
            for plan in scenario.sessions.values()
        ]
        self.plain = {client.name: client.plain for client in self.clients}
        self.targets = [
            TargetMachine(world, self.network, f"target-{number}", spec)
            for number, spec in enumerate(scenario.targets)
        ]
        self.drafters = [
            DrafterMachine(world, self.network, name, spec, self.plain)
            for name, spec in scenario.drafters.items()
        ]
        self.machines: dict[str, Machine] = {
            machine.name: machine for machine in (host, *self.targets, *self.drafters)
        }
        self.batch: BatchMachine | None = None
        if scenario.batch is not None:
            folder = Path(files.enter_context(TemporaryDirectory(dir=FOLDER)))
            self.batch = self.machines["batch"] = BatchMachine(
                world, self.network, scenario.batch, folder, self.plain, target_faults
            )
        self.checked: dict[int, tuple[RequestState, int]] = {}
        self.known_texts: dict[int, tuple[DraftState, int]] = {}
        self.epochs: set[tuple[str, int]] = set()
        self.queues: dict[str, list[str]] = {}
        self.orphans: dict[int, tuple[RequestState, float]] = {}
        self.router: Router | None = None
        self.controller = Controller(world, self.targets, self.drafters, self.tell)

    def tell(self, targets: list) -> None:  # type: ignore[type-arg]
        def update() -> None:
            if self.router is not None:
                self.router.update(targets)

        self.gateway.call_later(0.001, update)
        if self.batch is not None:
            self.batch.tell(targets)

    # The course of a run

    def run(self) -> None:
        world = self.world
        world.after_turn = self.check
        for fault in self.scenario.faults.values():
            world.fate.call_at(fault.at, self.begin_fault, fault)
        world.run(lambda: self.router is not None, END_S)
        if not world.run(self.is_over, END_S):
            waiting = [client.name for client in self.clients if not client.outcome]
            waiting += ["batch"] if self.batch and not self.batch.finished else []
            world.fail(f"{', '.join(waiting)}: not ended after {END_S:g} s")
        if world.failure is None:
            self.settle()

    def is_over(self) -> bool:
        return all(client.outcome for client in self.clients) and (
            self.batch is None or self.batch.finished
        )

    def open_gateway(self) -> None:
        self.router = Router(GrpcTarget)
        for client in self.clients:
            self.gateway.create_task(client.run(self.router))

    def settle(self) -> None:
        """Let all faults end, and check that nothing is left."""
        world = self.world
        world.log("check", "all sessions are over")
        if self.router is not None:
            self.gateway.create_task(self.router.close())
            self.router = None
        world.run(lambda: False, max(world.now + 1.0, self.last_fault() + 4.0))
        if world.failure is None:
            self.check_settled()
        self.controller.over = True
        for machine in self.targets:
            self.detach(machine)
        world.run(lambda: False, world.now + 4.0)
        if world.failure is None:
            self.check_left()
        if world.failure is None:
            self.end()

    def last_fault(self) -> float:
        faults = self.scenario.faults.values()
        return max((fault.at + fault.seconds for fault in faults), default=0.0)

    def detach(self, machine: TargetMachine) -> None:
        actor = machine.actor
        if actor is not None:
            machine.call(lambda: actor.drafters([]), lambda _: None)

    def end(self) -> None:
        """End the processes in order, and check that their threads end."""
        world = self.world
        for target in living(self.targets):
            target.loop.create_task(target.target.stop())
        for drafter in living(self.drafters):
            if drafter.host is not None:
                drafter.loop.create_task(drafter.host.stop())
        world.run(lambda: False, world.now + 1.0)
        machines = living(list(self.machines.values()))
        for loop in (machine.loop for machine in machines):
            if loop.tasks() or loop.threads:
                world.fail(f"{loop.name} has ended, with {loop.tasks()} and {loop.threads} left")

    # Faults

    def begin_fault(self, fault: Fault) -> None:
        machine = self.machines.get(fault.who)
        if machine is None or (fault.other and fault.other not in self.machines):
            return
        self.world.log("fault", str(fault))
        match fault.kind:
            case "kill":
                machine.kill()
            case "stop" | "pause":
                machine.stop()
                self.world.fate.call_later(fault.seconds, machine.resume)
            case "cut":
                self.network.cut(fault.who, fault.other)
                self.world.fate.call_later(fault.seconds, self.network.heal, fault.who, fault.other)
            case "leave" if isinstance(machine, DrafterMachine):
                self.controller.wanted.discard(fault.who)
                self.world.fate.call_later(fault.seconds, self.controller.wanted.add, fault.who)
            case "end":
                machine.end()
            case "drain" if isinstance(machine, TargetMachine):
                self.controller.drain(machine)

    # Promises

    def check(self, loop: ProcessLoop) -> None:
        """Check what holds after each turn of a process."""
        machine = self.machines.get(loop.name)
        if isinstance(machine, TargetMachine) and machine.loop is loop and machine.actor:
            self.check_target(machine)
        elif isinstance(machine, DrafterMachine) and machine.loop is loop and machine.host:
            self.check_drafter(machine)
        if loop is self.gateway:
            for client in self.clients:
                client.check_time(self.session_limit)

    def check_drafter(self, machine: DrafterMachine) -> None:
        """Check that it knows each text, or knows that it does not."""
        states = machine.engine.states
        if len(states) > limits.SESSIONS:
            self.world.fail(f"{machine.name} has {len(states)} sessions")
        if self.scenario.noise.flip:
            return
        for state in states.values():
            known = self.known_texts.get(id(state))
            length = len(state.tokens)
            if state.lost or (known is not None and known[1] == length):
                continue
            self.known_texts[id(state)] = state, length
            name, prompt = state.opened.session, state.opened.prompt
            plain = self.plain[name]
            plain.token(length - prompt)
            if state.tokens[prompt:] != plain.tokens[: length - prompt]:
                self.world.fail(f"{machine.name} believes in another text of {name}")

    def check_target(self, machine: TargetMachine) -> None:
        requests = machine.engine.requests
        reserved = sum(state.slots for state in requests.running.values())
        if requests.admission.reserved != reserved:
            self.world.fail(
                f"{machine.name} reserves {requests.admission.reserved} slots,"
                f" its sessions need {reserved}"
            )
        if len(requests.running) > 1 and reserved > requests.admission.budget:
            self.world.fail(f"{machine.name} reserves {reserved} slots, more than it has")
        if machine.engine.inbox.qsize() > MAX_INBOX_MESSAGES + 1000:
            self.world.fail(f"the inbox of {machine.name} grows without bound")
        for state in requests.running.values():
            self.check_session(machine, state)
        self.check_queue(machine)

    def check_queue(self, machine: TargetMachine) -> None:
        """Check that nobody overtakes, and that nothing runs whose caller has gone."""
        requests, name = machine.engine.requests, machine.address
        queue = [command.request.session for command in requests.admission.waiting]
        before = self.queues.get(name, [])
        for place, session in enumerate(before):
            passed = [other for other in before[:place] if other in queue]
            if session in requests.running and passed:
                self.world.fail(f"at {machine.name} {session} overtakes {passed[0]}")
        self.queues[name] = queue
        for session, state in requests.running.items():
            if session in machine.target._sessions:
                self.orphans.pop(id(state), None)
                continue
            since = self.orphans.setdefault(id(state), (state, self.world.now))[1]
            if self.world.now - since > ORPHAN_S + machine.paused_since(since):
                self.world.fail(f"{machine.name} still works on {session}, whose caller has gone")

    def check_session(self, machine: TargetMachine, state: RequestState) -> None:
        """Check a running session's tokens, and that its epoch is new."""
        session, known = state.session, self.checked.get(id(state))
        if known is None:
            if (session.id, session.epoch) in self.epochs:
                self.world.fail(
                    f"{machine.name} begins {session.id} in epoch {session.epoch} again"
                )
            self.epochs.add((session.id, session.epoch))
            if session.epoch > MAX_CALLS:
                self.world.fail(f"{session.id} was offered to targets {session.epoch} times")
            known = state, session.prompt
        plain, length = self.plain[session.id], len(session.tokens)
        for place in range(known[1], length):
            if session.tokens[place] != plain.token(place - session.prompt):
                self.world.fail(
                    f"{machine.name} commits {session.tokens[place]} as token"
                    f" {place - session.prompt} of {session.id},"
                    f" not {plain.token(place - session.prompt)}"
                )
                return
        self.checked[id(state)] = state, length

    def check_settled(self) -> None:
        """Check what drafters know when all sessions are over."""
        if any(getattr(self.scenario.noise, kind) for kind in NOISES):
            return
        for drafter in living(self.drafters):
            self.check_empty(drafter.name, {"sessions": list(drafter.engine.states)})
        if self.scenario.key_bits < 64:
            return
        for target in living(self.targets):
            for link in target.links():
                for kind in ("malformed", "surplus"):
                    if link.counters[kind]:
                        self.world.fail(f"{target.name} counts {kind} messages: {link.counters}")

    def check_left(self) -> None:
        """Check that nothing is left when all sessions are over and drafters are detached."""
        for target in living(self.targets):
            engine, requests = target.engine, target.engine.requests
            left = {
                "sessions": [*requests.running, *requests.admission.waiting],
                "reserved slots": requests.admission.reserved,
                "callers": target.target._sessions,
                "links": target.target.drafters,
                "drafters": tuple(engine.drafters),
                "messages": engine.inbox.qsize(),
                "tasks": target.loop.tasks(),
                "threads": len(target.loop.threads) - 1,
            }
            self.check_empty(target.name, left)
            if requests.prefixes.slots > target.spec.kv_slots // 4:
                self.world.fail(f"{target.name} keeps {requests.prefixes.slots} slots")
        for drafter in living(self.drafters):
            left = {
                "sessions": list(drafter.engine.states),
                "messages": drafter.engine.inbox.qsize(),
                "tasks": drafter.loop.tasks(),
                "threads": len(drafter.loop.threads) - 1,
            }
            self.check_empty(drafter.name, left)
        self.check_empty("the network", {"calls": self.network.open_calls()})
        self.check_empty("gateway", {"tasks": self.gateway.tasks()})
        if self.batch is not None:
            self.check_empty("batch", {"tasks": self.batch.loop.tasks()})

    def check_empty(self, who: str, left: dict[str, object]) -> None:
        for what, remains in left.items():
            if remains:
                self.world.fail(f"{who} has {what} left: {remains}")


def living(machines: Sequence[SomeMachine]) -> list[SomeMachine]:
    return [machine for machine in machines if not machine.loop.dead]
