"""`python -m bench.load`: what the gateway adds, ten times more requests than it has room for, and clients that leave."""

import asyncio
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.chaos.clients import ReferenceCase, build_cases
from bench.load.disconnects import Disconnects, disconnects
from bench.load.gateway_overhead import GatewayOverhead, gateway_overhead
from bench.load.overload import Overload, overload
from bench.load.served_fleet import ServedFleet, serving
from bench.reports.grid import Grid
from runtime.config import Placement, TargetConfig
from runtime.core.errors import OutriderError
from runtime.model_paths import bundled_model

NUM_CASES, TOKENS_PER_CASE = 24, 96
WARM_UP_CLIENTS = 200  # clients
TURNS = 4


def main(
    streams: Annotated[
        int, typer.Option(min=1, help="at one time, for what the gateway adds")
    ] = 16,
    places: Annotated[
        int, typer.Option(min=24, help="of the gateway: requests that may be under way")
    ] = 24,
    rounds: Annotated[int, typer.Option(min=1, help="each way")] = 8,
    seconds: Annotated[
        float,
        typer.Option(
            min=1, help="of overload, in turns with as many of a gateway that is just full"
        ),
    ] = 30.0,
    times: Annotated[float, typer.Option(min=1, help="as many requests as are answered")] = 10.0,
    clients: Annotated[int, typer.Option(min=8, help="that leave")] = 1000,
    seed: Annotated[int, typer.Option(help="of what clients do")] = 1,
    target: Annotated[str, typer.Option(help="model")] = bundled_model("target"),
    draft: Annotated[str, typer.Option(help="model")] = bundled_model("draft"),
    out: Annotated[
        Path | None, typer.Option("--json", help="write the result into this file")
    ] = None,
) -> None:
    """Exit code 1 where a goal is missed."""
    console = Console(highlight=False)

    async def loaded(
        site: ServedFleet, known: list[ReferenceCase]
    ) -> tuple[GatewayOverhead, Overload, Disconnects]:
        console.log("what the gateway adds")
        cost = await gateway_overhead(site, known, streams, rounds)
        console.log("overload")
        crowd = await overload(site, known, places, times, seconds / TURNS, TURNS)
        console.log("clients that leave")
        return cost, crowd, await disconnects(site, known, clients, WARM_UP_CLIENTS, seed)

    try:
        console.log("answering each request plainly")
        here = Placement(num_cpus=1, threads=1, listen="127.0.0.1")
        known = asyncio.run(
            build_cases(
                TargetConfig(model=target, dtype="float32", device="cpu", placement=here),
                NUM_CASES,
                TOKENS_PER_CASE,
                seed,
            )
        )
        console.log("starting target, drafter and gateway")
        with serving(target, draft, places) as site:
            found = asyncio.run(loaded(site, known))
    except OutriderError as error:
        console.print(str(error), style="red")
        raise typer.Exit(2) from error
    met = [one.met for one in found]
    rows = [row for one in found for row in one.rows()]
    rows.append(("load of the machine", f"{os.getloadavg()[0]:.1f}"))
    console.print(Grid("load", ("what", "result"), tuple(rows), ("result",)).terminal())
    if out is not None:
        cost, crowd, left = found
        told = {
            "added": {**asdict(cost), "met": cost.met},
            "overload": {**asdict(crowd), "met": crowd.met},
            "departures": {**asdict(left), "met": left.met},
        }
        out.write_text(
            json.dumps({**told, "rows": rows, "load": os.getloadavg()[0]}, indent=1) + "\n"
        )
    raise typer.Exit(0 if all(met) else 1)


if __name__ == "__main__":
    typer.run(main)
