"""A deployment under blows: clients ask, processes die, the controller replaces them; then everybody counts."""

import asyncio
import contextlib
import os
import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.controller.controller import Controller
from actors.controller.fleet_view import Fleet, TargetState
from actors.ray_session import ray_cluster, translate_ray_errors
from actors.routing.router import Router, updated_router
from actors.rpc.endpoints import ActorLocation
from bench.chaos.clients import DEADLINE_S, Seen, Watched, cases, stream
from bench.chaos.faults import Victim, inject, next_count, next_fault
from bench.chaos.outcome import Outcome
from runtime.config import Deployment, Placement, PoolConfig, TargetConfig
from runtime.core.cpu_partition import split_cores

HERE = Placement(num_cpus=1, threads=1, listen="127.0.0.1")
POOL = "chaos"
PATIENCE = 5.0  # seconds for an answer of the controller
END = 30.0  # seconds for actors to be told that it is over

Note = Callable[[str], None]  # told what is being done, and how far it is


@dataclass(frozen=True, slots=True)
class Options:
    """`every`: seconds between two blows or, with `most`, between two changes of the number of drafters, from 0 to `most`, and no blows."""

    target: str
    draft: str
    streams: int
    seconds: float
    targets: int
    drafters: int
    tokens: int
    seed: int
    every: float = 1.0
    most: int | None = None
    cases: int = 24


def plan(options: Options) -> Deployment:
    """Targets on one half of the cores, drafters on the other, as where they have devices of their own."""
    mine, others = split_cores(sorted(os.sched_getaffinity(0)), 1)
    here, there = (HERE.model_copy(update={"cores": cores}) for cores in (mine, others))
    target = TargetConfig(
        model=options.target,
        dtype="float32",
        device="cpu",
        replicas=options.targets,
        placement=here,
    )
    pool = PoolConfig(
        name=POOL,
        model=options.draft,
        dtype="float32",
        device="cpu",
        count=options.drafters,
        placement=there,
    )
    return Deployment(target=target, pools=(pool,))


def run(options: Options, note: Note) -> Outcome:
    """On a Ray of its own, which ends with it. Raises Unavailable, ModelRefused where the deployment does not start."""
    with ray_cluster(None, cpus=options.targets + max(options.drafters, options.most or 0)):
        return inside(options, note)


def inside(options: Options, note: Note) -> Outcome:
    """As `run`, in the cluster that this process has joined."""
    kind = ray.remote(Controller).options(num_cpus=0, max_concurrency=8)
    controller = kind.remote(plan(options), prefix=f"chaos-{uuid.uuid4().hex[:6]}-")
    try:
        note("starting targets and drafters")
        ray.get(controller.start.remote())
        return asyncio.run(storm(options, controller, note))
    finally:
        with contextlib.suppress(RayError, GetTimeoutError):
            ray.get(controller.stop.remote(), timeout=END)


async def storm(options: Options, controller: Any, note: Note) -> Outcome:
    note("answering each request plainly")
    config = TargetConfig(model=options.target, dtype="float32", device="cpu", placement=HERE)
    known = await cases(config, options.cases, options.tokens, options.seed)
    seen, over, blows = Seen(), asyncio.Event(), Counter[str]()

    def look() -> Sequence[TargetState]:
        with translate_ray_errors():
            fleet: Fleet = ray.get(controller.fleet.remote(), timeout=PATIENCE)
        seen.look(fleet, time.monotonic())  # as the event loop's
        return fleet.targets

    async with updated_router(Router(lambda address: Watched(address, seen)), look) as router:
        began = asyncio.get_running_loop().time()
        streams = [
            asyncio.create_task(stream(router, known, number, over, seen))
            for number in range(options.streams)
        ]
        changes = 0
        doing = scale if options.most is not None else beat
        try:
            async with asyncio.timeout(options.seconds):
                async for what in doing(options, controller, seen):
                    blows.update([what] if what else [])
                    changes += options.most is not None
                    note(progress(seen, blows, changes))
        except TimeoutError:
            over.set()
        note("the last answers")
        finished, unfinished = await asyncio.wait(streams, timeout=DEADLINE_S)
        seconds = asyncio.get_running_loop().time() - began
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
        await asyncio.gather(*finished)
        replaced = getattr(await told(controller.fleet), "replaced", 0)
    return Outcome(
        streams=options.streams,
        targets=options.targets,
        drafters=options.drafters,
        seed=options.seed,
        seconds=seconds,
        finished=seen.counts["finished"],
        failed=seen.counts["failed"],
        differing=seen.counts["differing"],
        unfinished=len(unfinished),
        tokens=seen.counts["tokens"],
        replaced=replaced,
        changes=changes,
        blows=dict(blows),
        gaps=tuple(seen.gaps),
        returned=tuple(seen.returned),
        load=os.getloadavg()[0],
        wrong=tuple(seen.wrong),
    )


def progress(seen: Seen, blows: Counter[str], changes: int) -> str:
    done = f"{changes} changes" if changes else f"{blows.total()} blows"
    bad = seen.counts["failed"] + seen.counts["differing"]
    return f"{done}, {seen.counts['finished']} answers, {bad} of them wrong, {len(seen.gaps)} continuations"


async def told(method: Any, *arguments: object) -> Any:
    """The controller's answer; None where there is none in time."""
    try:
        return await asyncio.to_thread(ray.get, method.remote(*arguments), timeout=PATIENCE)
    except GetTimeoutError:
        return None


async def beat(options: Options, controller: Any, seen: Seen) -> AsyncIterator[str]:
    """A blow every so many seconds; yields the role and signal of each."""
    draw, struck = random.Random(options.seed), set[Victim]()
    while True:
        await asyncio.sleep(options.every)
        fleet: Fleet | None = await told(controller.fleet)
        places: dict[str, ActorLocation] | None = await told(controller.places)
        blow = next_fault(fleet, struck, draw) if fleet else None
        if blow is not None and places and inject(blow, places):
            struck.add((blow.name, blow.incarnation))
            seen.struck[blow.address] = asyncio.get_running_loop().time()
            yield f"{blow.role} {blow.signal.name}"
        else:
            yield ""


async def scale(options: Options, controller: Any, seen: Seen) -> AsyncIterator[str]:
    """Another number of drafters every so many seconds; yields after each change."""
    draw, count = random.Random(options.seed), options.drafters
    while True:
        await asyncio.sleep(options.every)
        wanted = next_count(count, options.most or 0, draw)
        if await told(controller.scale, POOL, wanted) is not None:
            count = wanted
            yield ""
