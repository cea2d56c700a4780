"""`outrider drain`: one actor less, without losing a session."""

import json
import sys
import time
from typing import Annotated

import typer

from actors.cli.commands.options import Address, Json
from actors.cli.views.generation_view import Progress
from actors.controller.fleet_view import Fleet
from actors.launch import cluster_client

PERIOD = 0.2  # seconds between two looks


def drain(
    actor: Annotated[
        str, typer.Argument(help="name of a target or a drafter, as `outrider status` shows it")
    ],
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Let an actor finish what it has, give it nothing new, and end it; return when it has gone. There is one fewer of its kind then.

    Ctrl-C ends the waiting, not the wish.
    """
    with Progress(quiet=as_json) as progress, cluster_client.controller(address) as controller:
        fleet: Fleet = controller.ask("drain", actor)
        while (left := sessions(fleet, actor)) is not None:
            progress.note(f"{actor} has {left} sessions left")
            time.sleep(PERIOD)
            fleet = controller.fleet()
    if as_json:
        sys.stdout.write(json.dumps({"drained": actor}) + "\n")


def sessions(fleet: Fleet, name: str) -> int | None:
    """Of the actor of that name while it is draining; None once it has gone."""
    targets = {
        target.name: target.sessions for target in fleet.targets if target.state == "draining"
    }
    drafters = {
        drafter.name: drafter.report.sessions if drafter.report else 0
        for drafter in fleet.drafters
        if drafter.state == "draining"
    }
    return (targets | drafters).get(name)
