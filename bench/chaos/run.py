"""Run a deployment under faults: clients send requests, processes die, the controller replaces
them, and everything is counted."""

import asyncio
import contextlib
import os
import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.controller.controller import Controller
from actors.fleet.fleet_state import Fleet, TargetState
from actors.fleet.ray_session import ray_cluster, translate_ray_errors
from actors.routing.router import Router, updated_router
from actors.rpc.endpoints import ActorLocation
from bench.chaos.chaos_report import ChaosReport
from bench.chaos.clients import (
    DEADLINE_S,
    Hit,
    Observations,
    ObservedTarget,
    build_cases,
    run_client,
)
from bench.chaos.faults import Victim, inject, next_count, next_fault
from runtime.config import Deployment, Placement, PoolConfig, TargetConfig
from runtime.core.cpu_partition import split_cores

LOOPBACK = Placement(num_cpus=1, threads=1, listen="127.0.0.1")
POOL = "chaos"
CONTROLLER_TIMEOUT_S = 5.0  # for an answer of the controller
SHUTDOWN_TIMEOUT_S = 30.0  # for the actors to stop

Notify = Callable[[str], None]  # receives the current step and its progress


@dataclass(frozen=True, slots=True)
class ChaosOptions:
    """The options of a chaos run.

    `period_s` is the time between two faults. If `max_drafters` is set, there are no faults: the
    number of drafters changes every `period_s`, from 0 to `max_drafters`.
    """

    target: str
    draft: str
    streams: int
    seconds: float
    targets: int
    drafters: int
    tokens: int
    seed: int
    period_s: float = 1.0
    max_drafters: int | None = None
    cases: int = 24


def chaos_deployment(options: ChaosOptions) -> Deployment:
    """Place targets on one half of the cores and drafters on the other, as if on separate
    devices."""
    mine, others = split_cores(sorted(os.sched_getaffinity(0)), 1)
    here, there = (LOOPBACK.model_copy(update={"cores": cores}) for cores in (mine, others))
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


def run(options: ChaosOptions, note: Notify) -> ChaosReport:
    """Run on a private Ray, which ends with the run.

    Raises Unavailable or ModelRefused if the deployment does not start.
    """
    with ray_cluster(None, cpus=options.targets + max(options.drafters, options.max_drafters or 0)):
        return run_in_cluster(options, note)


def run_in_cluster(options: ChaosOptions, note: Notify) -> ChaosReport:
    """Run in the cluster that this process has joined; see `run`."""
    kind = ray.remote(Controller).options(num_cpus=0, max_concurrency=8)
    controller = kind.remote(chaos_deployment(options), prefix=f"chaos-{uuid.uuid4().hex[:6]}-")
    try:
        note("starting targets and drafters")
        ray.get(controller.start.remote())
        return asyncio.run(run_under_faults(options, controller, note))
    finally:
        with contextlib.suppress(RayError, GetTimeoutError):
            ray.get(controller.stop.remote(), timeout=SHUTDOWN_TIMEOUT_S)


async def run_under_faults(options: ChaosOptions, controller: Any, note: Notify) -> ChaosReport:
    note("answering each request by plain decoding")
    config = TargetConfig(model=options.target, dtype="float32", device="cpu", placement=LOOPBACK)
    known = await build_cases(config, options.cases, options.tokens, options.seed)
    seen, over, blows = Observations(), asyncio.Event(), Counter[str]()

    def look() -> Sequence[TargetState]:
        with translate_ray_errors():
            fleet: Fleet = ray.get(controller.fleet.remote(), timeout=CONTROLLER_TIMEOUT_S)
        seen.update_downtime(fleet, time.monotonic())  # the event loop's clock
        return fleet.targets

    async with updated_router(
        Router(lambda address: ObservedTarget(address, seen)), look
    ) as router:
        began = asyncio.get_running_loop().time()
        streams = [
            asyncio.create_task(run_client(router, known, number, over, seen))
            for number in range(options.streams)
        ]
        changes = 0
        doing = vary_drafters if options.max_drafters is not None else inject_faults
        try:
            async with asyncio.timeout(options.seconds):
                async for what in doing(options, controller, seen):
                    blows.update([what] if what else [])
                    changes += options.max_drafters is not None
                    note(progress_line(seen, blows, changes))
        except TimeoutError:
            over.set()
        note("waiting for the last answers")
        finished, unfinished = await asyncio.wait(streams, timeout=DEADLINE_S)
        seconds = asyncio.get_running_loop().time() - began
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
        await asyncio.gather(*finished)
        replaced = getattr(await call_controller(controller.fleet), "replaced", 0)
    return ChaosReport(
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


def progress_line(seen: Observations, blows: Counter[str], changes: int) -> str:
    done = f"{changes} changes" if changes else f"{blows.total()} faults"
    bad = seen.counts["failed"] + seen.counts["differing"]
    return (
        f"{done}, {seen.counts['finished']} answers, {bad} of them wrong, {len(seen.gaps)} "
        "continuations"
    )


async def call_controller(method: Any, *arguments: object) -> Any:
    """Return the controller's answer, or None after a timeout."""
    try:
        return await asyncio.to_thread(
            ray.get, method.remote(*arguments), timeout=CONTROLLER_TIMEOUT_S
        )
    except GetTimeoutError:
        return None


async def inject_faults(
    options: ChaosOptions,
    controller: Any,
    seen: Observations,
    spared: Collection[str] = (),
) -> AsyncIterator[str]:
    """Inject a fault every `period_s` seconds; yield the role and signal of each.

    Members with the names `spared` are not hit.
    """
    draw, already_hit = random.Random(options.seed), set[Victim]()
    while True:
        await asyncio.sleep(options.period_s)
        fleet: Fleet | None = await call_controller(controller.fleet)
        places: dict[str, ActorLocation] | None = await call_controller(controller.places)
        fault = next_fault(fleet, already_hit, draw, spared) if fleet else None
        if fault is not None and places and inject(fault, places):
            already_hit.add((fault.name, fault.incarnation))
            now = asyncio.get_running_loop().time()
            seen.hits[fault.address] = Hit(now, fault.signal.name)
            yield f"{fault.role} {fault.signal.name}"
        else:
            yield ""


async def vary_drafters(
    options: ChaosOptions, controller: Any, seen: Observations
) -> AsyncIterator[str]:
    """Change the number of drafters every `period_s` seconds; yield after each change."""
    draw, count = random.Random(options.seed), options.drafters
    while True:
        await asyncio.sleep(options.period_s)
        wanted = next_count(count, options.max_drafters or 0, draw)
        if await call_controller(controller.scale, POOL, wanted) is not None:
            count = wanted
            yield ""
