"""Runs a deployment for one command: in this process, or as Ray actors reached by gRPC."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from typing import Protocol

from actors.calibration_store import save_calibrations, save_target_state, target_state_file
from actors.fleet.fleet_state import Fleet, TargetState
from actors.fleet.ray_session import ray_cluster, translate_ray_errors
from runtime.config import Deployment, TlsConfig
from runtime.core.errors import naming
from runtime.core.messages import Chunk, Request
from runtime.draft.draft_host import DraftHost
from runtime.model_paths import drafter_calibration_file
from runtime.telemetry.tracing import Recording

Note = Callable[[str], None]  # gets a short progress message
ANSWER_TIMEOUT_S = 5.0  # of the controller
STOP_TIMEOUT_S = 10.0  # of the controller


class Service(Protocol):
    def generate(self, request: Request) -> AsyncGenerator[Chunk, None]: ...


PollTargets = Callable[[], Sequence[TargetState]]
OpenService = Callable[[], contextlib.AbstractAsyncContextManager[Service]]


@contextlib.contextmanager
def serving(
    deployment: Deployment,
    address: str | None,
    in_process: bool,
    note: Note,
    recordings: list[Recording] | None = None,
) -> Iterator[OpenService]:
    """Starts the deployment, and ends it with the block.

    Yields a function that opens the service on a running event loop. At the end, `recordings` gets
    what the target and the drafters have recorded.
    """
    if in_process:
        yield lambda: local_service(deployment, note, recordings)
    else:
        with ray_deployment(deployment, address, note, recordings) as look:
            yield lambda: remote_service(look, deployment.security.tls)


@contextlib.asynccontextmanager
async def local_service(
    deployment: Deployment, note: Note, recordings: list[Recording] | None = None
) -> AsyncIterator[Service]:
    """Runs target and drafters in this process."""
    from actors.compose import build_drafter, build_target

    record = recordings is not None
    note(f"loading {deployment.target.model}")
    with naming(deployment.target.model):
        target = (await asyncio.to_thread(build_target, deployment.target, record)).target
    target.start()
    hosts: list[DraftHost] = []
    try:
        for config in deployment.drafters():
            note(f"loading drafter {config.name}")
            with naming(config.model or deployment.target.model):
                host = await asyncio.to_thread(
                    build_drafter, config, deployment.target.model, record
                )
            host.start()
            hosts.append(host)
            target.attach(config.name, host)
        yield target
    finally:
        await target.stop()
        for host in hosts:
            await host.stop()
        engine = target.engine
        save_target_state(
            target_state_file(deployment.target),
            engine.requests.calibrations,
            [engine.scheduler],
        )
        for host, config in zip(hosts, deployment.drafters(), strict=False):
            save_calibrations(
                drafter_calibration_file(config, deployment.target.model),
                host.draft_engine.calibrations,
            )
        if recordings is not None:
            recordings += [
                target.engine.trace.drain(),
                *(host.draft_engine.trace.drain() for host in hosts),
            ]


@contextlib.asynccontextmanager
async def remote_service(look: PollTargets, tls: TlsConfig | None) -> AsyncIterator[Service]:
    """Yields a router to the targets.

    If a target dies, its sessions continue on its next life.
    """
    from actors.routing.router import Router, updated_router
    from actors.rpc.client import GrpcTarget

    async with updated_router(Router(lambda address: GrpcTarget(address, tls)), look) as router:
        yield router


@contextlib.contextmanager
def ray_deployment(
    deployment: Deployment,
    address: str | None,
    note: Note,
    recordings: list[Recording] | None = None,
) -> Iterator[PollTargets]:
    """Runs controller, targets and drafters on a Ray cluster.

    Yields a function that returns the targets, and raises Unavailable if the controller does not
    answer. Raises Unavailable if the cluster cannot be reached or started, and the error of an
    actor's start.
    """
    note("joining Ray" if address else "starting Ray")
    drafters = len(deployment.drafters())
    with ray_cluster(address, cpus=deployment.target.replicas + drafters):
        import ray

        from actors.controller.controller import Controller

        note(f"loading {deployment.target.model} and {drafters} drafters")
        kind = ray.remote(Controller).options(num_cpus=0, max_concurrency=4)
        controller = kind.remote(
            deployment, prefix=f"outrider-{uuid.uuid4().hex[:6]}-", record=recordings is not None
        )

        def look() -> Sequence[TargetState]:
            with translate_ray_errors():
                fleet: Fleet = ray.get(controller.fleet.remote(), timeout=ANSWER_TIMEOUT_S)
            return fleet.targets

        ray.get(controller.start.remote())
        yield look
        if recordings is not None:
            recordings += ray.get(controller.trace.remote())
        ray.get(controller.stop.remote(), timeout=STOP_TIMEOUT_S)
