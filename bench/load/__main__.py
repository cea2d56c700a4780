"""`python -m bench.load` measures the gateway's overhead, tenfold overload, and clients that
disconnect."""

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
    streams: Annotated[int, typer.Option(min=1, help="concurrent streams, for the overhead")] = 16,
    places: Annotated[int, typer.Option(min=24, help="capacity of the gateway in requests")] = 24,
    rounds: Annotated[int, typer.Option(min=1, help="rounds each way, for the overhead")] = 8,
    seconds: Annotated[
        float,
        typer.Option(min=1, help="duration of the overload, alternating with as long at capacity"),
    ] = 30.0,
    times: Annotated[
        float, typer.Option(min=1, help="offered load as a multiple of capacity")
    ] = 10.0,
    clients: Annotated[int, typer.Option(min=8, help="clients that disconnect")] = 1000,
    seed: Annotated[int, typer.Option(help="seed of the clients")] = 1,
    target: Annotated[str, typer.Option(help="model")] = bundled_model("target"),
    draft: Annotated[str, typer.Option(help="model")] = bundled_model("draft"),
    out: Annotated[
        Path | None, typer.Option("--json", help="write the result into this file")
    ] = None,
) -> None:
    """Exit with code 1 if a goal is missed."""
    console = Console(highlight=False)

    async def loaded(
        site: ServedFleet, known: list[ReferenceCase]
    ) -> tuple[GatewayOverhead, Overload, Disconnects]:
        console.log("gateway overhead")
        cost = await gateway_overhead(site, known, streams, rounds)
        console.log("overload")
        crowd = await overload(site, known, places, times, seconds / TURNS, TURNS)
        console.log("disconnecting clients")
        return cost, crowd, await disconnects(site, known, clients, WARM_UP_CLIENTS, seed)

    try:
        console.log("answering each request by plain decoding")
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
