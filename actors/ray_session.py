"""How processes come to a Ray cluster and leave it, and Ray's errors as the project's own."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from runtime.core.errors import OutriderError, Unavailable

if TYPE_CHECKING:
    from ray.exceptions import RayTaskError

OBJECT_STORE_BYTES = 100 * 2**20  # bytes; nothing of ours goes through it
NAMESPACE = "outrider"
PROBE_TIMEOUT_S = 3.0  # seconds for a cluster to answer
ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray 2.60 warns without it
    "RAY_worker_niceness": "0",  # Ray's 15 would let any other process hold up target and drafters
}


@contextlib.contextmanager
def ray_cluster(address: str | None, cpus: int = 1) -> Iterator[None]:
    """This process in the cluster at `address`, or in one of its own with so many CPUs, which ends with the block.

    Raises Unavailable where the cluster cannot be reached or started; inside, Ray's errors come out as the project's own.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    quiet: Any = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            probe(address)
            ray.init(address=address, **quiet)
        else:
            # "local": not the one that RAY_ADDRESS or an earlier `ray start` names.
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **quiet,
            )
    except (RuntimeError, ValueError, OSError, OverflowError) as error:
        raise Unavailable(unreachable(address, str(error))) from error
    try:
        with translate_ray_errors():
            yield
    finally:
        ray.shutdown()


def probe(address: str) -> None:
    """Raises OSError where nobody listens: Ray itself would try for two minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=PROBE_TIMEOUT_S).close()


def unreachable(address: str | None, why: str) -> str:
    first = why.strip().splitlines()[0] if why.strip() else "no reason given"
    if address:
        return f"no Ray cluster at {address} ({first}): start one with `ray start --head`, or leave --address out for a local one"
    return f"Ray does not start on this machine ({first}): see /tmp/ray/session_latest/logs, or use --in-process"


@contextlib.contextmanager
def translate_ray_errors() -> Iterator[None]:
    """Ray's errors as the project's own."""
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError

    try:
        yield
    except RayTaskError as error:
        raise cause_of(error) from error
    except (RayError, GetTimeoutError) as error:
        raise Unavailable(
            f"an actor has ended or does not answer ({first_line(error)}): see `outrider logs`"
        ) from error


def cause_of(error: "RayTaskError") -> OutriderError:
    """The project's own error inside Ray's wrapping; Unavailable with the last line where it is none of ours."""
    if isinstance(error.cause, OutriderError):
        return error.cause
    return Unavailable(f"an actor failed: {str(error).strip().splitlines()[-1]}")


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
