"""Connects processes to a Ray cluster, and translates Ray's errors into the project's own."""

import contextlib
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.core.errors import OutriderError, Unavailable

if TYPE_CHECKING:
    from ray.exceptions import RayTaskError

OBJECT_STORE_BYTES = 100 * 2**20  # the project stores nothing in it
NAMESPACE = "outrider"
NODE_TIMED_OUT = "timed out during startup"  # in the text of Ray's plain Exception
PATH_TOO_LONG = "AF_UNIX path length"  # in the text of Ray's error
MAX_SOCKET_PATH_BYTES = 107  # of Linux
# /session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store, below Ray's folder
SOCKET_NAME_BYTES = 64
PROBE_TIMEOUT_S = 3.0  # for a cluster to accept a connection
ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray 2.60 warns without it
    "RAY_worker_niceness": "0",  # with Ray's 15, any other process would delay target and drafters
}

log = logging.getLogger(__name__)


@contextlib.contextmanager
def ray_cluster(address: str | None, cpus: int = 1) -> Iterator[None]:
    """Connects this process to the cluster at `address`, or to a private one with `cpus` CPUs.

    A private cluster ends with the block. Inside the block, Ray's errors are translated. Raises
    Unavailable if the cluster cannot be reached or started.
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
            start_local(
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **quiet,
            )
    except Exception as error:  # Ray raises plain Exception if a node does not come up
        raise Unavailable(unreachable(address, str(error))) from error
    try:
        with translate_ray_errors():
            yield
    finally:
        ray.shutdown()


def start_local(**options: Any) -> None:
    """Starts a private cluster; tries again once if its node does not come up.

    Ray forks its processes. A child hangs before it starts if another thread of this process held
    a lock just then, as those of gRPC do; Ray gives up after 30 seconds. Raises what Ray raises.
    """
    import ray

    if "RAY_TMPDIR" not in os.environ and (folder := socket_folder("ray")).parent != Path(
        tempfile.gettempdir()
    ):
        options["_temp_dir"] = str(folder)
    # "local" ignores RAY_ADDRESS and a cluster started by `ray start`.
    start = partial(ray.init, address="local", **options)
    try:
        start()
    except Exception as error:
        if NODE_TIMED_OUT not in str(error):
            raise
        log.warning("Ray's node did not come up: starting Ray again")
        ray.shutdown()
        start()


def socket_folder(name: str) -> Path:
    """Returns the path of a folder in which Ray can keep its sockets.

    It is in the folder for temporary files, or in /tmp if the paths of sockets would be too long.
    """
    folder = Path(tempfile.gettempdir(), name)
    fits = len(os.fsencode(folder)) + SOCKET_NAME_BYTES <= MAX_SOCKET_PATH_BYTES
    return folder if fits else Path("/tmp", name)


def probe(address: str) -> None:
    """Raises OSError at once if nobody listens at the address: Ray itself would retry for two
    minutes.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=PROBE_TIMEOUT_S).close()


def unreachable(address: str | None, why: str) -> str:
    first = why.strip().splitlines()[0] if why.strip() else "no reason given"
    if address:
        return (
            f"no Ray cluster at {address} ({first}): start one with `ray start --head`,"
            " or leave --address out for a local one"
        )
    if PATH_TOO_LONG in first:
        return "Ray does not start on this machine: set RAY_TMPDIR to a path of at most 40 bytes"
    return (
        f"Ray does not start on this machine ({first}):"
        " see /tmp/ray/session_latest/logs, or use --in-process"
    )


@contextlib.contextmanager
def translate_ray_errors() -> Iterator[None]:
    """Raises Ray's errors as the project's own."""
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
    """Returns the project's error that Ray has wrapped, or Unavailable with the last line of any
    other.
    """
    if isinstance(error.cause, OutriderError):
        return error.cause
    return Unavailable(
        f"an actor failed ({str(error).strip().splitlines()[-1]}): see its log with `outrider logs`"
    )


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
