"""A running deployment that answers requests: in this process, or as Ray actors reached by gRPC."""

import asyncio
import contextlib
import logging
import os
import socket
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from actors.memory import remember
from runtime.config import Deployment, memory_of, memory_of_drafter
from runtime.drafting import DraftHost
from runtime.errors import OutriderError, Unavailable
from runtime.messages import Chunk, Request
from runtime.tracing import Recording

if TYPE_CHECKING:
    from ray.exceptions import RayTaskError

Note = Callable[[str], None]  # told what is being done, for people
OBJECT_STORE = 100 * 2**20  # bytes; nothing of ours goes through it
NAMESPACE = "outrider"
KNOCK = 3.0  # seconds for a cluster to answer


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
            yield lambda: remote_service(target)


@contextlib.asynccontextmanager
async def local_service(deployment: Deployment, note: Note, recordings: list[Recording] | None = None) -> AsyncIterator[Service]:
    from actors.compose import build_drafter, build_target

    record = recordings is not None
    note(f"loading {deployment.target.model}")
    target = (await asyncio.to_thread(build_target, deployment.target, record)).target
    target.start()
    hosts: list[DraftHost] = []
    try:
        for config in deployment.drafters:
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
        for host, config in zip(hosts, deployment.drafters, strict=False):
            remember(memory_of_drafter(config, deployment.target.model), host.grower.calibrations)
        if recordings is not None:
            recordings += [target.engine.trace.take(), *(host.grower.trace.take() for host in hosts)]


@contextlib.asynccontextmanager
async def remote_service(address: str) -> AsyncIterator[Service]:
    from actors.grpc_links import GrpcTarget

    client = GrpcTarget(address)
    try:
        yield client
    finally:
        await client.close()


@contextlib.contextmanager
def cluster(deployment: Deployment, address: str | None, note: Note, recordings: list[Recording] | None = None) -> Iterator[str]:
    """Controller, target and drafters on a Ray cluster; yields the target's gRPC address.

    Raises Unavailable where the cluster cannot be reached or started, and what an actor's own start raised.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray 2.60 warns without it
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would let any other process hold up target and drafters
    import ray
    from ray.exceptions import RayTaskError

    from actors.controller import Controller

    note("joining Ray" if address else "starting Ray")
    actors = len(deployment.drafters) + 1
    try:
        if address:
            knock(address)
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(
                num_cpus=actors,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (RuntimeError, ValueError, OSError, OverflowError) as error:
        raise Unavailable(unreachable(address, str(error))) from error
    try:
        note(f"loading {deployment.target.model} and {actors - 1} drafters")
        controller = (
            ray.remote(Controller)
            .options(num_cpus=0, max_concurrency=4)
            .remote(deployment, f"outrider-{uuid.uuid4().hex[:6]}", recordings is not None)
        )
        try:
            yield ray.get(controller.start.remote())
            if recordings is not None:
                recordings += ray.get(controller.trace.remote())
            ray.get(controller.stop.remote(), timeout=10)
        except RayTaskError as error:
            raise cause_of(error) from error
    finally:
        ray.shutdown()


def knock(address: str) -> None:
    """Raises OSError where nobody listens: Ray itself would try for two minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=KNOCK).close()


def unreachable(address: str | None, why: str) -> str:
    first = why.strip().splitlines()[0] if why.strip() else "no reason given"
    if address:
        return f"no Ray cluster at {address} ({first}): start one with `ray start --head`, or leave --address out for a local one"
    return f"Ray does not start on this machine ({first}): see /tmp/ray/session_latest/logs, or use --in-process"


def cause_of(error: "RayTaskError") -> OutriderError:
    """The project's own error inside Ray's wrapping; Unavailable with the last line where it is none of ours."""
    if isinstance(error.cause, OutriderError):
        return error.cause
    return Unavailable(f"the deployment did not start: {str(error).strip().splitlines()[-1]}")
