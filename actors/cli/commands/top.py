"""`outrider top`: status, again and again."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

from rich.console import Console
from rich.live import Live

from actors.cli.commands.options import Address, Json
from actors.cli.commands.status import look
from actors.cli.views.status_view import Look, as_json, shown
from actors.launch import cluster_client
from actors.launch.cluster_client import Controller
from runtime.core.errors import Unavailable

PERIOD = 1.0  # seconds


def top(address: Address = None, as_object: Json = False) -> None:
    """The status, live, until Ctrl-C; with --json one object in each line."""
    with cluster_client.controller(address) as controller:
        before = look(controller)
        if as_object:
            for now in looks(controller):
                sys.stdout.write(json.dumps(as_json(before, now)) + "\n")
                sys.stdout.flush()
                before = now
        with Live(
            shown(before, before), console=Console(highlight=False), screen=True, auto_refresh=False
        ) as screen:
            for now in looks(controller):
                screen.update(shown(before, now), refresh=True)
                before = now


def looks(controller: Controller) -> Iterator[Look]:
    """One after the other, without those that the controller does not answer in time: when all are busy, people look."""
    while True:
        time.sleep(PERIOD)
        with suppress(Unavailable):
            yield look(controller)
