"""`outrider top`: shows the status continuously."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

from rich.console import Console
from rich.live import Live

from actors.cli.commands.options import Address, Json
from actors.cli.commands.status import take_snapshot
from actors.cli.views.status_view import Snapshot, render_status, status_json
from actors.launch.cluster import join_cluster
from runtime.core.errors import Unavailable

REFRESH_PERIOD_S = 1.0


def top(address: Address = None, as_object: Json = False) -> None:
    """Show the status continuously until Ctrl-C; with --json, one object per line."""
    with join_cluster(address):
        before = take_snapshot()
        if as_object:
            for now in snapshots():
                sys.stdout.write(json.dumps(status_json(before, now)) + "\n")
                sys.stdout.flush()
                before = now
        with Live(
            render_status(before, before),
            console=Console(highlight=False),
            screen=True,
            auto_refresh=False,
        ) as screen:
            for now in snapshots():
                screen.update(render_status(before, now), refresh=True)
                before = now


def snapshots() -> Iterator[Snapshot]:
    """Yields snapshots.

    Skips those that the controller does not answer in time: people use this command when the fleet
    is busy.
    """
    while True:
        time.sleep(REFRESH_PERIOD_S)
        with suppress(Unavailable):
            yield take_snapshot()
