"""`outrider drain`: removes one actor without losing a session."""

import json
import sys
import time
from typing import Annotated

import typer

from actors.cli.commands.options import Address, Json
from actors.cli.views.generation_view import Progress
from actors.fleet import client
from actors.fleet.fleet_state import Fleet
from actors.launch.cluster import join_cluster

POLL_PERIOD_S = 0.2


def drain(
    actor: Annotated[str, typer.Argument(help="name of a target or drafter in `outrider status`")],
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Drain an actor and remove it; return when it has ended.

    The count of its role is reduced by one.

    Ctrl-C stops waiting; the actor is drained nevertheless.
    """
    with Progress(quiet=as_json) as progress, join_cluster(address):
        fleet: Fleet = client.ask_controller("drain", actor)
        while (left := sessions_left(fleet, actor)) is not None:
            progress.note(f"{actor} has {left} sessions left")
            time.sleep(POLL_PERIOD_S)
            fleet = client.fetch_fleet()
    if as_json:
        sys.stdout.write(json.dumps({"drained": actor}) + "\n")


def sessions_left(fleet: Fleet, name: str) -> int | None:
    """Returns the sessions of a draining actor; None once it has ended."""
    targets = {
        target.name: target.sessions for target in fleet.targets if target.state == "draining"
    }
    drafters = {
        drafter.name: drafter.report.sessions if drafter.report else 0
        for drafter in fleet.drafters
        if drafter.state == "draining"
    }
    return (targets | drafters).get(name)
