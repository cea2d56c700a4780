"""Starts and ends the local Ray of `outrider serve` and `outrider down`.

It outlives both commands, and accepts connections from this user only.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp

from pydantic import TypeAdapter, ValidationError

from actors.fleet.ray_session import ENVIRONMENT, OBJECT_STORE_BYTES, socket_folder
from runtime.core.cache_folder import cache_folder
from runtime.core.errors import Unavailable

HOST = "127.0.0.2"  # Ray replaces 127.0.0.1 by the machine's address
LOGICAL_CPUS = 256  # as Ray counts them, so that no actor waits for a CPU on the only machine
FOLDER_PREFIX = "outrider-"
START_TIMEOUT_S, END_TIMEOUT_S = 120.0, 10.0


@dataclass(frozen=True, slots=True)
class LocalRay:
    """A local Ray cluster.

    address  address that processes join it by
    folder   its logs, its sockets, and the token that every process must present to join
    session  session ID of its processes
    born     start times of its first processes in clock ticks since boot, by process ID; a process
             that reuses an ID has another
    """

    address: str
    dashboard: str
    folder: Path
    session: int
    born: dict[int, int]

    @property
    def token(self) -> Path:
        return self.folder / "token"

    def environment(self) -> dict[str, str]:
        """Returns the environment variables that a process needs to join."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}


FORMAT = TypeAdapter(LocalRay)


def find() -> LocalRay | None:
    """Returns the local Ray that is running; None if there is none."""
    try:
        found = FORMAT.validate_json(record_file().read_bytes())
    except (OSError, ValidationError):
        return None
    return found if any(process_birth(pid) == born for pid, born in found.born.items()) else None


def start() -> LocalRay:
    """Starts a local Ray.

    Raises Unavailable if Ray does not start. If it is interrupted, it ends what it has started.
    """
    place = socket_folder(f"{FOLDER_PREFIX}12345678").parent  # as long as mkdtemp's name
    folder = Path(mkdtemp(prefix=FOLDER_PREFIX, dir=place))
    token = folder / "token"
    with token.open("x") as file:
        file.write(secrets.token_hex(32))
    token.chmod(0o600)
    gcs, client, dashboard, agent = free_ports(4)
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        f"--node-ip-address={HOST}",
        f"--port={gcs}",
    ]
    command += [
        f"--ray-client-server-port={client}",
        "--include-dashboard=true",
        "--dashboard-host=127.0.0.1",
    ]
    command += [
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}",
        "--disable-usage-stats",
        f"--temp-dir={folder}",
    ]
    command += [
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--num-cpus={LOGICAL_CPUS}",
        "--include-log-monitor=false",
    ]
    new = LocalRay(f"{HOST}:{gcs}", f"http://127.0.0.1:{dashboard}", folder, 0, {})
    environment = (
        os.environ | ENVIRONMENT | new.environment() | {"RAY_prestart_worker_first_driver": "0"}
    )
    log = folder / "start.log"
    with contextlib.ExitStack() as undoing:
        undoing.callback(shutil.rmtree, folder, ignore_errors=True)
        with log.open("wb") as output:
            # A new session keeps Ctrl-C away from it, and lets `end` find all its processes.
            starting = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        undoing.callback(starting.wait)
        undoing.callback(lambda: end(with_processes(new, starting.pid)))
        try:
            failed = starting.wait(START_TIMEOUT_S) != 0
        except subprocess.TimeoutExpired:
            failed = True
        found = with_processes(new, starting.pid)
        if failed or not found.born:
            last = log.read_text("utf-8", "replace").strip().splitlines()[-1:] or [
                "no reason given"
            ]
            raise Unavailable(
                f"cannot start Ray on this machine ({last[0]}): give --address of a running cluster"
            )
        record_file().parent.mkdir(parents=True, exist_ok=True)
        record_file().write_bytes(FORMAT.dump_json(found))
        undoing.pop_all()
    return found


def with_processes(ray: LocalRay, session: int) -> LocalRay:
    """Returns the local Ray with the processes of its session."""
    return replace(ray, session=session, born=session_processes(session))


def end(ray: LocalRay) -> None:
    """Ends its processes and those that they have started; returns when they are gone."""
    if any(process_birth(pid) == born for pid, born in ray.born.items()):
        members = session_processes(ray.session)
        send_signal(members, signal.SIGTERM)
        deadline = time.monotonic() + END_TIMEOUT_S
        while session_processes(ray.session) and time.monotonic() < deadline:
            time.sleep(0.1)
        send_signal(session_processes(ray.session), signal.SIGKILL)
    shutil.rmtree(ray.folder, ignore_errors=True)
    if (remembered := find()) is None or remembered == ray:
        record_file().unlink(missing_ok=True)


def record_file() -> Path:
    """Returns the file that records the local Ray."""
    return cache_folder() / "local-ray.json"


def session_processes(session: int) -> dict[int, int]:
    """Returns the start times of the live processes of a session, by process ID."""
    found = {}
    for folder in Path("/proc").iterdir():
        if (
            folder.name.isdecimal()
            and (fields := read_stat(int(folder.name)))
            and int(fields[3]) == session
            and fields[0] != "Z"
        ):
            found[int(folder.name)] = int(fields[19])
    return found


def process_birth(pid: int) -> int | None:
    """Returns the start time of a live process in clock ticks since boot; None if it is gone."""
    fields = read_stat(pid)
    return int(fields[19]) if fields and fields[0] != "Z" else None


def read_stat(pid: int) -> list[str]:
    """Returns the fields of /proc/PID/stat from `state` on; none if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def send_signal(members: dict[int, int], what: signal.Signals) -> None:
    """Sends a signal to those processes that are still the same."""
    for pid, born in members.items():
        if process_birth(pid) == born:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, what)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [opened.getsockname()[1] for opened in sockets]


@contextlib.contextmanager
def join_environment(ray: LocalRay) -> Iterator[None]:
    """Lets this process join the local Ray. Enter it before Ray is imported."""
    before = {name: os.environ.get(name) for name in ray.environment()}
    os.environ.update(ray.environment())
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
