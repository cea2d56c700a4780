"""`outrider status`: shows the fleet once."""

import json
import sys
import time

from rich.console import Console

from actors.cli.commands.options import Address, Json
from actors.cli.views.status_view import Snapshot, render_status, status_json
from actors.fleet import client
from actors.launch.cluster import join_cluster

SAMPLE_PERIOD_S = 1.0  # between the two snapshots that rates come from


def status(address: Address = None, as_object: Json = False) -> None:
    """Show targets, pools, drafters, sessions, acceptance, lag, tokens per second and versions."""
    with join_cluster(address):
        before = take_snapshot()
        time.sleep(SAMPLE_PERIOD_S)
        now = take_snapshot()
    if as_object:
        sys.stdout.write(json.dumps(status_json(before, now)) + "\n")
    else:
        Console(highlight=False).print(render_status(before, now))


def take_snapshot() -> Snapshot:
    return Snapshot(time.monotonic(), client.fetch_fleet())
