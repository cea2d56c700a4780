"""Run a served fleet under mixed traffic and faults, and sample what its processes hold."""

import asyncio
import contextlib
import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.controller.controller import Controller
from actors.fleet.client import NAME
from actors.fleet.fleet_state import Fleet
from actors.fleet.ray_session import NAMESPACE, ray_cluster
from actors.rpc.endpoints import ActorLocation
from bench.chaos.clients import Observations
from bench.chaos.run import (
    SHUTDOWN_TIMEOUT_S,
    ChaosOptions,
    Notify,
    call_controller,
    chaos_deployment,
    inject_faults,
)
from bench.load.disconnects import requests_in_flight
from bench.soak.growth import QUANTITIES, Track, measure_growth, warm_up_s
from bench.soak.process_stats import descendants, find_by_command, read_parents, read_process
from bench.soak.requests import SoakCase, build_requests
from bench.soak.soak_report import SoakReport
from bench.soak.traffic import Tally, answer_plainly, run_batches, run_client
from runtime.config import Deployment, GatewayConfig

# A template for models without one, so that there is chat in the traffic.
TEMPLATE = (
    "{% for message in messages %}# {{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant: {% endif %}"
)
TOKENIZER_CONFIG = "tokenizer_config.json"
CONTROLLER = "controller"
# Processes of Ray itself. They keep what they know of actors that have ended, and are not judged.
RAY_COMMANDS = ("raylet", "gcs_server")
REST_TIMEOUT_S = 60.0  # for everything to end after the traffic
REST_POLL_PERIOD_S = 1.0
FORK_SERVERS = 1  # of each target; it stays, and forks a process for each grammar
TRAFFIC_TIMEOUT_S = 300.0  # for the last answers


@dataclass(frozen=True, slots=True)
class SoakOptions:
    """The options of a soak.

    clients      concurrent clients, beside one batch job
    fault_s      seconds between two faults
    sample_s     seconds between two samples
    memory_goal  growth of memory that is allowed, in MiB per hour
    """

    target: str
    draft: str
    seconds: float
    clients: int = 6
    targets: int = 2
    drafters: int = 2
    tokens: int = 64
    seed: int = 1
    fault_s: float = 60.0
    sample_s: float = 5.0
    memory_goal: float = 1.0


def run(options: SoakOptions, folder: Path, note: Notify) -> SoakReport:
    """Run on a private Ray, which ends with the run; `folder` is for files of this run.

    Raises Unavailable or ModelRefused if the deployment does not start.
    """
    with ray_cluster(None, cpus=options.targets + options.drafters + 1):
        return run_in_cluster(options, folder, note)


def run_in_cluster(options: SoakOptions, folder: Path, note: Notify) -> SoakReport:
    """Run in the cluster that this process has joined; see `run`."""
    model = with_template(Path(options.target), folder / "model")
    chaos = ChaosOptions(
        str(model),
        options.draft,
        streams=options.clients,
        seconds=options.seconds,
        targets=options.targets,
        drafters=options.drafters,
        tokens=options.tokens,
        seed=options.seed,
        period_s=options.fault_s,
    )
    kind = ray.remote(Controller).options(
        name=NAME, namespace=NAMESPACE, num_cpus=0, max_concurrency=8
    )
    controller = kind.remote(soak_deployment(chaos), served=True)
    try:
        note("starting targets, drafters and a gateway")
        fleet: Fleet = ray.get(controller.start.remote())
        return asyncio.run(Soak(options, chaos, controller, fleet, folder, note).run())
    finally:
        with contextlib.suppress(RayError, GetTimeoutError):
            ray.get(controller.stop.remote(), timeout=SHUTDOWN_TIMEOUT_S)


def with_template(model: Path, copy: Path) -> Path:
    """Return the model's folder if its tokenizer has a chat template, else a copy that has one."""
    if not (model / TOKENIZER_CONFIG).is_file():
        return model
    config = json.loads((model / TOKENIZER_CONFIG).read_text())
    if "chat_template" in config or (model / "chat_template.jinja").exists():
        return model
    shutil.copytree(model, copy)
    (copy / TOKENIZER_CONFIG).write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return copy


def soak_deployment(chaos: ChaosOptions) -> Deployment:
    return chaos_deployment(chaos).model_copy(update={"gateway": GatewayConfig(port=0)})


class Soak:
    """A run. Times are in seconds since its begin.

    spared  the members that faults never hit, so that they live from begin to end
    tracks  the samples of each process, by name and process ID
    """

    def __init__(
        self,
        options: SoakOptions,
        chaos: ChaosOptions,
        controller: Any,
        fleet: Fleet,
        folder: Path,
        note: Notify,
    ) -> None:
        self.options, self.chaos, self.controller = options, chaos, controller
        self.folder, self.note = folder, note
        self.model, self.port = fleet.served_model, urlsplit(fleet.gateways[0]).port or 0
        targets = [target.name for target in fleet.targets]
        drafters = [drafter.name for drafter in fleet.drafters]
        self.spared = frozenset(targets[:1] + drafters[:1])
        self.hit_names = frozenset(targets[1:] + drafters[1:])
        self.tally, self.faults = Tally(), Counter[str]()
        self.tracks: dict[tuple[str, int], Track] = {}
        self.began = 0.0

    async def run(self) -> SoakReport:
        """Run to the end, and wait until all is at rest."""
        options, over = self.options, asyncio.Event()
        self.note("answering each request by plain decoding")
        requests = build_requests(self.model, options.seed, options.tokens)
        cases = await answer_plainly(self.port, requests)
        controller_pid: int = await asyncio.to_thread(
            ray.get, self.controller.__ray_call__.remote(lambda _: os.getpid())
        )
        self.began = time.monotonic()
        traffic = self.start_traffic(cases, over)
        watching = asyncio.create_task(self.watch(controller_pid))
        try:
            async with asyncio.timeout(options.seconds):
                seen = Observations()
                async for what in inject_faults(self.chaos, self.controller, seen, self.spared):
                    self.faults.update([what] if what else [])
                    self.note(self.progress())
        except TimeoutError:
            over.set()
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        seconds = self.now()
        self.note("waiting for the last answers")
        _, unfinished = await asyncio.wait(traffic, timeout=TRAFFIC_TIMEOUT_S)
        for task in unfinished:
            task.cancel()
            self.tally.add_wrong(f"no answer within {TRAFFIC_TIMEOUT_S:g} s after the end")
        await asyncio.gather(*traffic, return_exceptions=bool(unfinished))
        left = await self.wait_for_rest()
        replaced = getattr(await call_controller(self.controller.fleet), "replaced", 0)
        return self.report(seconds, left, replaced)

    def start_traffic(
        self, cases: Sequence[SoakCase], over: asyncio.Event
    ) -> list[asyncio.Task[None]]:
        clients = [
            run_client(
                self.port, cases, random.Random(f"{self.options.seed}-{number}"), over, self.tally
            )
            for number in range(self.options.clients)
        ]
        batches = run_batches(self.port, cases, self.folder, over, self.tally)
        return [asyncio.create_task(one) for one in (*clients, batches)]

    def progress(self) -> str:
        minutes = self.now() / 60
        answers = self.tally.answers.total()
        return (
            f"{minutes:.0f} min, {self.faults.total()} faults, {answers} answers, "
            f"{self.tally.wrong} wrong"
        )

    async def watch(self, controller_pid: int) -> None:
        """Sample all processes every `sample_s` seconds."""
        while True:
            places: dict[str, ActorLocation] | None = await call_controller(self.controller.places)
            fleet: Fleet | None = await call_controller(self.controller.fleet)
            if places is not None and fleet is not None:
                pids = {name: place.pid for name, place in places.items()}
                sessions = open_sessions(fleet)
                with contextlib.suppress(OSError):
                    at_gateway = await requests_in_flight(self.port)
                    sessions |= dict.fromkeys(pids.keys() - sessions.keys(), at_gateway)
                await asyncio.to_thread(self.sample, pids | {CONTROLLER: controller_pid}, sessions)
            await asyncio.sleep(self.options.sample_s)

    def sample(self, pids: dict[str, int], sessions: dict[str, int]) -> None:
        """Add a sample of each process that lives."""
        at, parents = self.now(), read_parents()
        ray_pids = find_by_command(descendants(os.getpid(), parents), RAY_COMMANDS)
        for name, pid in (pids | ray_pids).items():
            stats = read_process(pid, parents)
            if stats is None:
                continue
            if (name, pid) not in self.tracks:
                judged = name in pids and name not in self.hit_names
                self.tracks[name, pid] = Track(name, pid, judged)
            found = asdict(stats) | ({"sessions": sessions[name]} if name in sessions else {})
            self.tracks[name, pid].add(
                at, {what: value / QUANTITIES[what][1] for what, value in found.items()}
            )

    def now(self) -> float:
        return time.monotonic() - self.began  # the event loop's clock

    async def wait_for_rest(self) -> tuple[str, ...]:
        """Return what is still open after REST_TIMEOUT_S; empty if all is at rest before."""
        now = asyncio.get_running_loop().time
        until = now() + REST_TIMEOUT_S
        while True:
            left = await self.find_open()
            if not left or now() > until:
                return left
            await asyncio.sleep(REST_POLL_PERIOD_S)

    async def find_open(self) -> tuple[str, ...]:
        """Return a line for each member that holds a session, and for requests of the gateway."""
        fleet: Fleet | None = await call_controller(self.controller.fleet)
        if fleet is None:
            return ("the controller does not answer",)
        found = [
            f"{name} {count} sessions" for name, count in open_sessions(fleet).items() if count
        ]
        if requests := await requests_in_flight(self.port):
            found.append(f"gateway {requests} requests")
        places: dict[str, ActorLocation] = await call_controller(self.controller.places) or {}
        parents = await asyncio.to_thread(read_parents)
        for target in fleet.targets:
            place = places.get(target.name)
            children = 0 if place is None else sum(1 for _ in descendants(place.pid, parents))
            if children > FORK_SERVERS:
                found.append(f"{target.name} {children - FORK_SERVERS} processes of grammars")
        return tuple(found)

    def report(self, seconds: float, left: tuple[str, ...], replaced: int) -> SoakReport:
        tracks = tuple(self.tracks.values())
        warm_up = warm_up_s(self.options.seconds)
        return SoakReport(
            seconds=seconds,
            seed=self.options.seed,
            period=self.options.fault_s,
            faults=dict(self.faults),
            replaced=replaced,
            answers=dict(self.tally.answers),
            wrong=self.tally.wrong,
            lines=tuple(self.tally.lines),
            left=left,
            warm_up=warm_up,
            growths=tuple(measure_growth(tracks, warm_up, self.options.memory_goal)),
            tracks=tracks,
            load=os.getloadavg()[0],
        )


def open_sessions(fleet: Fleet) -> dict[str, int]:
    """Return the sessions that each target and drafter holds, as it last reported."""
    found = {
        target.name: target.report.live + target.report.waiting
        for target in fleet.targets
        if target.report is not None
    }
    return found | {
        drafter.name: drafter.report.sessions
        for drafter in fleet.drafters
        if drafter.report is not None
    }
