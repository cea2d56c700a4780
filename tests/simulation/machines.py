"""Simulated processes with the product's objects in them: targets, drafters, a controller."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from actors.fleet.fleet_state import TargetState
from actors.rpc.client import GrpcLink
from actors.rpc.endpoints import Endpoint
from actors.rpc.server import DraftingService, TargetService
from actors.target import TargetActor
from protos.handshake import Hello
from runtime.config import ScheduleConfig, TargetConfig
from runtime.core.errors import Unavailable
from runtime.core.sampler_reference import reference_sample
from runtime.draft.draft_engine import DraftEngine
from runtime.draft.draft_host import DraftHost
from runtime.drafters.base import Drafter
from runtime.drafters.ngram import NgramDrafter
from runtime.scheduler_factory import make_scheduler
from runtime.schedulers.base import Scheduler
from runtime.schedulers.fixed import Fixed
from runtime.target.engine import Engine
from runtime.target.target import Target
from runtime.target.verifier import Verifier
from tests.simulation.network import Network
from tests.simulation.toys import EOS, VOCABULARY, Guesser, PlainOutput, SlowToy, stop_checker
from tests.simulation.virtual_time import (
    ProcessLoop,
    VirtualLock,
    VirtualQueue,
    VirtualThread,
    World,
    current_thread,
    sleep,
)

VOCABULARY_HASH = "toy"


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """How a target is built. `policy` is a policy of ScheduleConfig or "fixed"."""

    policy: str
    pass_s: float
    kv_slots: int


@dataclass(frozen=True, slots=True)
class DrafterSpec:
    """How a drafter is built. `method` is "guesser" or "ngram"."""

    method: str
    skill: float
    pass_s: float
    width: int


class Machine:
    """A name under which one process after another lives. `life` numbers them from 0."""

    def __init__(self, world: World, network: Network, name: str) -> None:
        self.world, self.network, self.name = world, network, name
        self.life = -1
        self.stops_for: list[tuple[float, float]] = []
        self.random = Random(f"{name}/{world.random.random()}")
        self.begin()

    @property
    def address(self) -> str:
        return f"{self.name}/{self.life}"

    @property
    def is_up(self) -> bool:
        return not self.loop.dead and self.loop.stopped_since is None

    def begin(self) -> None:
        """Start the next process of this name."""
        self.life += 1
        self.loop = ProcessLoop(self.world, self.name)
        self.world.log(self.name, f"starts, life {self.life}")
        self.loop.call_soon(self.build)

    def build(self) -> None:
        raise NotImplementedError

    def kill(self) -> None:
        if not self.loop.dead:
            self.world.log(self.name, "is killed")
            self.loop.stopped_since = None
            self.network.lost(self.loop)
            self.loop.kill()

    def paused_since(self, time: float) -> float:
        """Return the seconds for which it was stopped since a time."""
        return sum(max(0.0, end - max(begin, time)) for begin, end in self.stops_for)

    def stop(self) -> None:
        if self.is_up:
            self.world.log(self.name, "is stopped")
            self.loop.stopped_since = self.world.now
            self.network.watch()

    def resume(self) -> None:
        if self.loop.stopped_since is not None and not self.loop.dead:
            self.world.log(self.name, "goes on")
            self.stops_for.append((self.loop.stopped_since, self.world.now))
            self.loop.stopped_since = None

    def end(self) -> None:
        """End the process in order, as when its node is taken down."""
        if self.is_up:
            self.world.log(self.name, "ends")
            self.loop.call_soon(lambda: self.loop.create_task(self._end(self.loop)))

    async def _end(self, loop: ProcessLoop) -> None:
        await self.close()
        if loop is self.loop:
            self.world.fate.call_later(0.0, self.kill)

    async def close(self) -> None:
        """End what runs in the process."""
        raise NotImplementedError

    def call(self, method: Callable[[], object], done: Callable[[object], object]) -> None:
        """Call a method as Ray does: on a thread of the process, with a delay both ways."""

        def run() -> None:
            try:
                result: object = method()
            except Unavailable as error:
                result = error
            self.world.fate.call_later(0.001, done, result)

        self.loop.call_later(0.001, lambda: VirtualThread(self.loop, run).start())


class GatewayMachine(Machine):
    """The process of the router and its clients. It may be stopped, but lives for the whole run."""

    def __init__(self, world: World, network: Network, open_gateway: Callable[[], object]) -> None:
        self.open_gateway = open_gateway
        super().__init__(world, network, "gateway")

    def build(self) -> None:
        self.open_gateway()

    def kill(self) -> None:
        """Its clients would only hear that it is gone."""

    async def close(self) -> None:
        """It does not end before its clients."""


class LoopOfProcess:
    """An actors.rpc.loop_thread.LoopThread whose loop is the simulated process's own."""

    def __init__(self, loop: ProcessLoop) -> None:
        self.loop = loop

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run it to its end; the calling thread waits."""
        thread = current_thread(self.loop)
        task = self.loop.create_task(work)
        task.add_done_callback(lambda _: thread.wake())
        while not task.done():
            thread.park(None)
        return task.result()


class SimulatedActor(TargetActor):
    """An actor whose links read the virtual clock."""

    def _link(self, peer: Endpoint) -> GrpcLink:
        link = super()._link(peer)
        link._now = self.target.engine.clock
        return link


class TargetMachine(Machine):
    """A target: the product's engine, Target, TargetActor and gRPC service."""

    def __init__(self, world: World, network: Network, name: str, spec: TargetSpec) -> None:
        self.spec = spec
        super().__init__(world, network, name)

    def begin(self) -> None:
        self.actor: TargetActor | None = None
        super().begin()

    def build(self) -> None:
        loop, pass_s = self.loop, self.spec.pass_s
        random = self.random

        def seconds(rows: int) -> float:
            return pass_s * (1.0 + 0.02 * rows) * random.uniform(0.8, 1.3)

        model = SlowToy(lambda wait: sleep(loop, wait), seconds)
        engine = Engine(
            model,
            Verifier(reference_sample, EOS),
            make_policy(self.spec),
            loop.time,
            kv_slots=self.spec.kv_slots,
        )
        engine.inbox = VirtualQueue(loop)  # type: ignore[assignment]
        target = Target(engine, stop_checker)
        target._thread = VirtualThread(loop, engine.run)  # type: ignore[assignment]
        target.start()
        actor = SimulatedActor(TargetConfig(model="toy"))
        actor.lock = VirtualLock(loop)  # type: ignore[assignment]
        actor.network = LoopOfProcess(loop)  # type: ignore[assignment]
        actor.target, actor.tokens, actor.vocabulary_size = target, VOCABULARY, VOCABULARY
        actor.hash_below = lambda _: VOCABULARY_HASH  # type: ignore[assignment]
        self.actor, self.engine, self.target = actor, engine, target
        self.network.serve(self.address, loop, TargetService(target))

    async def close(self) -> None:
        if self.actor is not None:
            await self.target.stop()
            await asyncio.sleep(0.2)  # grace of the server

    def links(self) -> list[GrpcLink]:
        return [] if self.actor is None else list(self.actor.links.values())


class DrafterMachine(Machine):
    """A drafter: the product's draft engine, DraftHost and gRPC service."""

    def __init__(
        self,
        world: World,
        network: Network,
        name: str,
        spec: DrafterSpec,
        outputs: Mapping[str, PlainOutput],
    ) -> None:
        self.spec, self.outputs = spec, outputs
        super().__init__(world, network, name)

    def begin(self) -> None:
        self.host: DraftHost | None = None
        super().begin()

    def build(self) -> None:
        loop, spec, random = self.loop, self.spec, self.random

        def seconds(rows: int) -> float:
            return spec.pass_s * (1.0 + 0.05 * rows) * random.uniform(0.8, 1.3)

        def pause(wait: float) -> None:
            sleep(loop, wait)

        salt = random.randrange(1 << 30)
        drafter: Drafter = (
            Guesser(pause, seconds, self.outputs, spec.skill, salt)
            if spec.method == "guesser"
            else SlowNgram(pause, seconds)
        )
        engine = DraftEngine(drafter, self.name, spec.width, clock=loop.time)
        engine.inbox = VirtualQueue(loop)  # type: ignore[assignment]
        host = DraftHost(engine)
        host._thread = VirtualThread(loop, engine.run)  # type: ignore[assignment]
        host.start()
        self.engine, self.host = engine, host
        hello = Hello(VOCABULARY_HASH, "toy", self.name, self.life, tokens=VOCABULARY)
        self.network.serve(self.address, loop, DraftingService(host, hello))

    async def close(self) -> None:
        if self.host is not None:
            await self.host.stop()


class SlowNgram(NgramDrafter):
    """Prompt lookup; its passes take virtual time."""

    def __init__(self, pause: Callable[[float], None], seconds: Callable[[int], float]) -> None:
        self.pause, self.seconds = pause, seconds

    def expand(self, requests: Sequence[Any]) -> Any:
        self.pause(self.seconds(sum(len(request.leaves) for request in requests)))
        return super().expand(requests)


def make_policy(spec: TargetSpec) -> Scheduler:
    if spec.policy == "fixed":
        return Fixed(6)
    times = {rows: spec.pass_s * (1.0 + 0.02 * rows) for rows in (1, 2, 4, 8, 16, 32, 64)}
    return make_scheduler(ScheduleConfig(policy=spec.policy), times)


class Controller:
    """Tells targets and routers who is there, as actors.controller does. It restarts the dead.

    Its view of a process is as old as the last answer.
    """

    PERIOD_S = 0.5
    RESTART_S = 1.0

    def __init__(
        self,
        world: World,
        targets: Sequence[TargetMachine],
        drafters: Sequence[DrafterMachine],
        tell: Callable[[list[TargetState]], None],
    ) -> None:
        self.world, self.targets, self.drafters, self.tell = world, targets, drafters, tell
        self.wanted = {machine.name for machine in (*targets, *drafters)}
        self.dead_since: dict[str, float] = {}
        self.waiting: dict[str, float] = {}
        self.draining: set[str] = set()
        self.over = False
        world.fate.call_soon(self.look)

    def look(self) -> None:
        if self.over:
            return
        for machine in (*self.targets, *self.drafters):
            self.replace(machine)
        endpoints = [
            Endpoint(machine.name, machine.address, machine.life)
            for machine in self.drafters
            if machine.name in self.wanted and machine.host is not None and not machine.loop.dead
        ]
        for machine in self.targets:
            self.notify(machine, endpoints)
        self.tell(
            [
                TargetState(
                    machine.name,
                    machine.address,
                    machine.life,
                    self.state(machine),
                    0,
                    None,
                    "node",
                )
                for machine in self.targets
                if machine.name in self.wanted
                and machine.actor is not None
                and not machine.loop.dead
            ]
        )
        self.world.fate.call_later(self.PERIOD_S, self.look)

    def replace(self, machine: Machine) -> None:
        """Start a dead process again, after a while."""
        if not machine.loop.dead:
            self.dead_since.pop(machine.name, None)
        elif machine.name in self.wanted:
            since = self.dead_since.setdefault(machine.name, self.world.now)
            if self.world.now - since >= self.RESTART_S:
                machine.begin()

    def state(self, machine: TargetMachine) -> Literal["ready", "draining"]:
        return "draining" if machine.address in self.draining else "ready"

    def drain(self, machine: TargetMachine) -> None:
        """Drain a target; when its sessions are over, it ends and is started again."""
        actor, address = machine.actor, machine.address
        if actor is None or not machine.is_up or address in self.draining:
            return
        self.draining.add(address)

        def end(_: object) -> None:
            if machine.address == address:
                machine.end()

        machine.call(actor.drain, end)

    def notify(self, machine: TargetMachine, endpoints: list[Endpoint]) -> None:
        """Tell a target its drafters, unless it still works on the last call."""
        actor, life = machine.actor, machine.address
        if actor is None or machine.loop.dead or life in self.waiting:
            return
        self.waiting[life] = self.world.now
        machine.call(lambda: actor.drafters(endpoints), lambda _: self.waiting.pop(life, None))
