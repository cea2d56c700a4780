"""`outrider compare`: compares two pools of drafters on the same sessions."""

import json
import sys
import time
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from actors.cli.commands.options import Address, Json
from actors.cli.commands.scale import pool_of
from actors.cli.views.generation_view import Progress
from actors.cli.views.status_view import (
    GuessTotals,
    borderless_table,
    format_ratio,
    life_key,
    short_name,
    sum_guesses,
)
from actors.fleet import client
from actors.fleet.fleet_state import Fleet
from actors.launch.cluster import join_cluster
from runtime.core.sampling_params import check_range
from runtime.telemetry.reports import GuessReport

MAX_SECONDS = 86_400.0


def compare(
    first: Annotated[str, typer.Argument(metavar="POOL_A")],
    second: Annotated[str, typer.Argument(metavar="POOL_B")],
    seconds: Annotated[float, typer.Option(help="seconds to watch")] = 10.0,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Compare accepted tokens, acceptance and lag of two pools on the same sessions."""
    check_range("seconds", seconds, 0.1, MAX_SECONDS)
    with Progress(quiet=as_json) as progress, join_cluster(address):
        before = client.fetch_fleet()
        pools = [pool_of(before, name) for name in (first, second)]
        progress.note(f"watching for {seconds:g} s")
        time.sleep(seconds)
        now = client.fetch_fleet()
    found = {pool.name: pool_guesses(before, now, pool.name) for pool in pools}
    if as_json:
        sys.stdout.write(json.dumps({name: asdict(one) for name, one in found.items()}) + "\n")
    else:
        Console(highlight=False).print(comparison_table(found, now, seconds))


def pool_guesses(before: Fleet, now: Fleet, pool: str) -> GuessTotals:
    """Returns the guesses of a pool between two snapshots, on targets that are in both."""
    last = {life_key(target): target.report for target in before.targets}
    names = {drafter.name for drafter in (*before.drafters, *now.drafters) if drafter.pool == pool}
    found = []
    for target in now.targets:
        earlier = last.get(life_key(target))
        if target.report is None or earlier is None:
            continue
        found += [
            guesses_since(earlier.guesses.get(name, GuessReport()), report)
            for name, report in target.report.guesses.items()
            if name in names
        ]
    return sum_guesses(found)


def guesses_since(before: GuessReport, now: GuessReport) -> GuessReport:
    """Returns the counters since `before`; all of `now` if the drafter has restarted."""
    begun = (
        before
        if before.proposed <= now.proposed and before.accepted <= now.accepted
        else GuessReport()
    )
    return GuessReport(
        now.proposed - begun.proposed,
        now.accepted - begun.accepted,
        max(0, now.late - begun.late),
        max(0, now.stale - begun.stale),
        now.lead,
        now.round_trip,
        now.resting,
    )


def comparison_table(found: dict[str, GuessTotals], fleet: Fleet, seconds: float) -> Table:
    shown = borderless_table(
        "pool", "draft", "drafters", "proposed", "accepted", "tokens/s", "of them", "lag", "ahead"
    )
    for name, one in found.items():
        pool = pool_of(fleet, name)
        shown.add_row(
            name,
            short_name(pool.draft),
            str(pool.ready),
            str(one.proposed),
            str(one.accepted),
            f"{one.accepted / seconds:.1f}",
            format_ratio(one.accepted, one.proposed, "{:.0%}"),
            f"{1000 * one.round_trip:.1f} ms" if one.proposed else "-",
            f"{one.lead:.1f}" if one.proposed else "-",
        )
    return shown
