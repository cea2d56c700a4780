"""`outrider scale`: changes the number of drafters in a pool."""

import json
import sys
import time
from dataclasses import asdict
from typing import Annotated

import typer

from actors.cli.commands.options import Address, Json
from actors.cli.views.generation_view import Progress
from actors.fleet import client
from actors.fleet.fleet_state import Fleet, PoolState
from actors.launch.cluster import join_cluster
from runtime.core.errors import InvalidRequest, Unavailable

POLL_PERIOD_S = 0.2


def scale(
    wish: Annotated[
        str, typer.Argument(metavar="POOL=N", help="pool and its number of drafters, from 0")
    ],
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Change the number of drafters of a pool; return when it is reached.

    Surplus drafters are drained.

    If the cluster lacks resources, the command waits for them. Ctrl-C stops waiting; the change
    stays. The command fails if a drafter is given up after repeated failures.
    """
    pool, count = parse_wish(wish)
    with Progress(quiet=as_json) as progress, join_cluster(address):
        fleet: Fleet = client.ask_controller("scale", pool, count)
        while not is_settled(fleet, pool):
            raise_given_up(fleet, pool)
            progress.note(f"{pool_of(fleet, pool).ready} of {count} drafters are ready")
            time.sleep(POLL_PERIOD_S)
            fleet = client.fetch_fleet()
    if as_json:
        sys.stdout.write(json.dumps(asdict(pool_of(fleet, pool))) + "\n")


def parse_wish(wish: str) -> tuple[str, int]:
    pool, _, count = wish.rpartition("=")
    if not pool or not count.isdecimal() or len(count) > 4:
        raise InvalidRequest(
            f"{wish[:64]!r} is not POOL=N: give a pool's name and a number, such as draft=3",
            "wish",
        )
    return pool, int(count)


def is_settled(fleet: Fleet, pool: str) -> bool:
    """Tells whether as many drafters are ready as wanted, and none is starting or draining."""
    return (
        pool_of(fleet, pool).ready
        == pool_of(fleet, pool).count
        == sum(drafter.pool == pool for drafter in fleet.drafters)
    )


def raise_given_up(fleet: Fleet, pool: str) -> None:
    """Raises Unavailable if a drafter of the pool was given up."""
    for drafter in fleet.drafters:
        if drafter.pool == pool and drafter.state == "failed":
            raise Unavailable(f"{drafter.name} is {drafter.trouble}")


def pool_of(fleet: Fleet, name: str) -> PoolState:
    for pool in fleet.pools:
        if pool.name == name:
            return pool
    raise InvalidRequest(
        f"pool {name!r} was removed: another deployment was applied meanwhile", "pool"
    )
