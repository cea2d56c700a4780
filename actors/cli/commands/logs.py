"""`outrider logs`: shows the log of an actor from any node."""

import json
import sys
from collections import deque
from pathlib import Path
from typing import Annotated, Any

import typer

from actors.cli.commands.options import Address, Json
from actors.launch.cluster import join_cluster
from runtime.core.errors import InvalidRequest, Unavailable
from runtime.core.sampling_params import check_int

MAX_LINES = 100_000
READ_TIMEOUT_S = 10.0  # for the node to answer
RAY_PREFIXES = (":job_id:", ":actor_name:", ":task_name:")  # of lines for Ray itself


def logs(
    actor: Annotated[
        str,
        typer.Argument(help="target or drafter in `outrider status`, or gateway-0, or controller"),
    ] = "controller",
    lines: Annotated[int, typer.Option(help="maximum of lines, the last ones")] = 100,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Show the log of an actor, of its last life if it is lost.

    Logs contain no prompts, outputs or keys.
    """
    check_int("lines", lines, 1, MAX_LINES)
    with join_cluster(address):
        text = read_log(actor, lines)
    sys.stdout.write(
        json.dumps({"actor": actor, "lines": text}) + "\n"
        if as_json
        else "".join(f"{line}\n" for line in text)
    )


def read_log(actor: str, lines: int) -> list[str]:
    """Returns the last lines of a log.

    Raises InvalidRequest if the actor is unknown, and Unavailable if its node is gone.
    """
    import ray

    # The public API needs the dashboard, which a cluster may lack.
    from ray._private.state import actors
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    found = [
        entry
        for entry in actors().values()
        if is_life_of(str(entry["Name"]), actor) and entry["Pid"]
    ]
    if not found:
        raise InvalidRequest(f"unknown actor {actor!r}: see `outrider status`", "actor")
    last: dict[str, Any] = max(found, key=lambda entry: int(entry["StartTime"]))
    there = NodeAffinitySchedulingStrategy(last["Address"]["NodeID"], soft=False)
    task = ray.remote(tail).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    try:
        text: list[str] = ray.get(task.remote(last["Pid"], lines), timeout=READ_TIMEOUT_S)
    except RayError as error:
        raise Unavailable(
            f"the node of {actor} does not answer, so its log cannot be read"
        ) from error
    return text


def is_life_of(name: str, actor: str) -> bool:
    """Tells whether an actor's name in the cluster belongs to a life of `actor`."""
    stem, _, incarnation = name.rpartition("-")
    return name == actor or (stem == actor and incarnation.isdecimal())


def tail(pid: int, lines: int) -> list[str]:
    """Returns the last lines of a process on this node, standard error after standard output."""
    import ray

    context = ray.get_runtime_context()
    folder = Path(context.get_temp_dir()) / context.get_session_name() / "logs"
    files = sorted(folder.glob(f"worker-*-{pid}.out")) + sorted(folder.glob(f"worker-*-{pid}.err"))
    last: deque[str] = deque(maxlen=lines)  # Ray lets a log grow to half a gigabyte
    for file in files:
        with file.open(encoding="utf-8", errors="replace") as written:
            last.extend(line.rstrip("\n") for line in written if not line.startswith(RAY_PREFIXES))
    return list(last)
