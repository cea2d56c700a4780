"""A served fleet under load, and what can be observed from outside."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray

from actors.controller.controller import Controller
from actors.fleet.client import NAME
from actors.fleet.fleet_state import Fleet
from actors.fleet.ray_session import NAMESPACE, ray_cluster
from actors.rpc.endpoints import ActorLocation
from runtime.config import (
    Deployment,
    GatewayConfig,
    LimitsConfig,
    Placement,
    PoolConfig,
    TargetConfig,
)
from runtime.core.cpu_partition import split_cores
from runtime.telemetry.reports import TargetReport

# Enough for all requests. Finished texts may take a quarter of it, which fills soon, so the cache
# does not add to the growth of memory.
KV_TOKENS = 6144
SHUTDOWN_TIMEOUT_S = 30.0  # for the actors to stop


@dataclass(frozen=True, slots=True)
class ServedFleet:
    """A gateway on loopback with one target behind it.

    target  the target's gRPC address
    report  returns the target's current report
    pids    the serving processes, by name
    """

    port: int
    model: str
    target: str
    report: Callable[[], TargetReport]
    pids: Mapping[str, int]


@contextlib.contextmanager
def serving(target: str, draft: str, requests: int) -> Iterator[ServedFleet]:
    """Serve one target, one drafter and a gateway with this capacity on a private Ray, until the
    block ends.

    Raises Unavailable or ModelRefused if they do not start.
    """
    with ray_cluster(None, cpus=3):
        kind = ray.remote(Controller).options(
            name=NAME, namespace=NAMESPACE, num_cpus=0, max_concurrency=8
        )
        controller = kind.remote(load_deployment(target, draft, requests), served=True)
        try:
            fleet: Fleet = ray.get(controller.start.remote())
            places: dict[str, ActorLocation] = ray.get(controller.places.remote())
            yield locate(fleet, places)
        finally:
            ray.get(controller.stop.remote(), timeout=SHUTDOWN_TIMEOUT_S)


def load_deployment(target: str, draft: str, requests: int) -> Deployment:
    """Place the target on one half of the cores and everything else on the other."""
    mine, others = split_cores(sorted(os.sched_getaffinity(0)), 1)
    here, there = (
        Placement(num_cpus=1, threads=1, listen="127.0.0.1", cores=cores)
        for cores in (mine, others)
    )
    return Deployment(
        target=TargetConfig(
            model=target, dtype="float32", device="cpu", kv_tokens=KV_TOKENS, placement=here
        ),
        pools=(
            PoolConfig(name="load", model=draft, dtype="float32", device="cpu", placement=there),
        ),
        gateway=GatewayConfig(port=0),
        limits=LimitsConfig(requests=requests),
    )


def locate(fleet: Fleet, places: Mapping[str, ActorLocation]) -> ServedFleet:
    (state,) = fleet.targets
    actor: Any = ray.get_actor(f"{state.name}-{state.incarnation}", namespace=NAMESPACE)
    return ServedFleet(
        port=urlsplit(fleet.gateways[0]).port or 0,
        model=fleet.served_model,
        target=state.address,
        report=lambda: ray.get(actor.report.remote()),
        pids={name: place.pid for name, place in places.items()},
    )


def anonymous_memory(pid: int) -> int:
    """Return the process's own memory in bytes, without file pages, which the system drops at
    will."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem", "VmSwap"))


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
