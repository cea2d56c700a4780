"""A running deployment that answers requests: in this process, or as Ray actors reached by gRPC."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Protocol

from actors.memory import remember
from actors.ray_edge import joined
from runtime.config import Deployment, TlsConfig, memory_of, memory_of_drafter
from runtime.drafting import DraftHost
from runtime.messages import Chunk, Request
from runtime.tracing import Recording

Note = Callable[[str], None]  # told what is being done, for people
STOP = 10.0  # seconds that actors may take to be told


class Service(Protocol):
    def generate(self, request: Request) -> AsyncGenerator[Chunk, None]: ...


Opener = Callable[[], contextlib.AbstractAsyncContextManager[Service]]


@contextlib.contextmanager
def serving(
    deployment: Deployment, address: str | None, in_process: bool, note: Note, recordings: list[Recording] | None = None
) -> Iterator[Opener]:
    """Start it; what is handed out opens the service on a running event loop. Everything started ends with the block.

    `recordings`: to be filled with what target and drafters record, when all is over.
    """
    if in_process:
        yield lambda: local_service(deployment, note, recordings)
    else:
        with cluster(deployment, address, note, recordings) as target:
            yield lambda: remote_service(target, deployment.security.tls)


@contextlib.asynccontextmanager
async def local_service(deployment: Deployment, note: Note, recordings: list[Recording] | None = None) -> AsyncIterator[Service]:
    from actors.compose import build_drafter, build_target

    record = recordings is not None
    note(f"loading {deployment.target.model}")
    target = (await asyncio.to_thread(build_target, deployment.target, record)).target
    target.start()
    hosts: list[DraftHost] = []
    try:
        for config in deployment.drafters():
            note(f"loading drafter {config.name}")
            host = await asyncio.to_thread(build_drafter, config, deployment.target.model, record)
            host.start()
            hosts.append(host)
            target.attach(config.name, host)
        yield target
    finally:
        await target.stop()
        for host in hosts:
            await host.stop()
        remember(memory_of(deployment.target.model, "target"), target.engine.calibrations)
        for host, config in zip(hosts, deployment.drafters(), strict=False):
            remember(memory_of_drafter(config, deployment.target.model), host.grower.calibrations)
        if recordings is not None:
            recordings += [target.engine.trace.take(), *(host.grower.trace.take() for host in hosts)]


@contextlib.asynccontextmanager
async def remote_service(address: str, tls: TlsConfig | None) -> AsyncIterator[Service]:
    from actors.grpc_edge import CALLER_SILENCE_MS
    from actors.grpc_links import GrpcTarget

    client = GrpcTarget(address, tls, CALLER_SILENCE_MS)
    try:
        yield client
    finally:
        await client.close()


@contextlib.contextmanager
def cluster(deployment: Deployment, address: str | None, note: Note, recordings: list[Recording] | None = None) -> Iterator[str]:
    """Controller, target and drafters on a Ray cluster; yields the target's gRPC address.

    Raises Unavailable where the cluster cannot be reached or started, and what an actor's own start raised.
    """
    note("joining Ray" if address else "starting Ray")
    drafters = len(deployment.drafters())
    with joined(address, cpus=deployment.target.replicas + drafters):
        import ray

        from actors.controller import Controller

        note(f"loading {deployment.target.model} and {drafters} drafters")
        kind = ray.remote(Controller).options(num_cpus=0, max_concurrency=4)
        controller = kind.remote(deployment, prefix=f"outrider-{uuid.uuid4().hex[:6]}-", record=recordings is not None)
        yield ray.get(controller.start.remote()).targets[0].address
        if recordings is not None:
            recordings += ray.get(controller.trace.remote())
        ray.get(controller.stop.remote(), timeout=STOP)
