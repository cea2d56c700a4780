"""`outrider status`: what is there and how it does."""

import json
import sys
import time

from rich.console import Console

from actors.cli.commands.options import Address, Json
from actors.cli.views.status_view import Look, as_json, shown
from actors.launch import cluster_client
from actors.launch.cluster_client import Controller

BETWEEN = 1.0  # seconds between the two looks that tokens per second are made of


def status(address: Address = None, as_object: Json = False) -> None:
    """Targets, pools, drafters, sessions, acceptance and lag of each drafter, tokens per second, versions."""
    with cluster_client.controller(address) as controller:
        before = look(controller)
        time.sleep(BETWEEN)
        now = look(controller)
    if as_object:
        sys.stdout.write(json.dumps(as_json(before, now)) + "\n")
    else:
        Console(highlight=False).print(shown(before, now))


def look(controller: Controller) -> Look:
    return Look(time.monotonic(), controller.fleet())
