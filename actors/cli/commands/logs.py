"""`outrider logs`: what an actor has written, on whichever node it is or was."""

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
READ_TIMEOUT_S = 10.0  # seconds for the node to answer
RAY_PREFIXES = (":job_id:", ":actor_name:", ":task_name:")  # lines that Ray writes for itself


def logs(
    actor: Annotated[
        str,
        typer.Argument(
            help="name of a target or a drafter as in `outrider status`, gateway-0, or controller"
        ),
    ] = "controller",
    lines: Annotated[int, typer.Option(help="the last so many")] = 100,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Show the log of an actor; of its last life where it is lost. There are no prompts, outputs and keys in it."""
    check_int("lines", lines, 1, MAX_LINES)
    with join_cluster(address):
        text = read_log(actor, lines)
    sys.stdout.write(
        json.dumps({"actor": actor, "lines": text}) + "\n"
        if as_json
        else "".join(f"{line}\n" for line in text)
    )


def read_log(actor: str, lines: int) -> list[str]:
    """Raises InvalidRequest for an actor that was never there, Unavailable where its node has gone."""
    import ray
    from ray._private.state import (
        actors,
    )  # the public API asks the dashboard, which clusters may not have
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    found = [
        entry
        for entry in actors().values()
        if is_life_of(str(entry["Name"]), actor) and entry["Pid"]
    ]
    if not found:
        raise InvalidRequest(
            f"there is no actor {actor!r} with a log: see `outrider status`", "actor"
        )
    last: dict[str, Any] = max(found, key=lambda entry: int(entry["StartTime"]))
    there = NodeAffinitySchedulingStrategy(last["Address"]["NodeID"], soft=False)
    task = ray.remote(tail).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    try:
        text: list[str] = ray.get(task.remote(last["Pid"], lines), timeout=READ_TIMEOUT_S)
    except RayError as error:
        raise Unavailable(
            f"the node of {actor} does not answer: its log is lost with it"
        ) from error
    return text


def is_life_of(name: str, actor: str) -> bool:
    """Whether an actor of that name in the cluster is, or was, the one that is meant."""
    stem, _, incarnation = name.rpartition("-")
    return name == actor or (stem == actor and incarnation.isdecimal())


def tail(pid: int, lines: int) -> list[str]:
    """On the node of that process: the end of what it has written, standard output before standard error."""
    import ray

    context = ray.get_runtime_context()
    folder = Path(context.get_temp_dir()) / context.get_session_name() / "logs"
    files = sorted(folder.glob(f"worker-*-{pid}.out")) + sorted(folder.glob(f"worker-*-{pid}.err"))
    last: deque[str] = deque(maxlen=lines)  # Ray lets a log grow to half a gigabyte
    for file in files:
        with file.open(encoding="utf-8", errors="replace") as written:
            last.extend(line.rstrip("\n") for line in written if not line.startswith(RAY_PREFIXES))
    return list(last)
