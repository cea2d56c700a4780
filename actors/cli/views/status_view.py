"""Shows a fleet as tables, or formats it as a JSON object.

Rates come from the difference of two snapshots.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from actors.fleet.fleet_state import DrafterState, Fleet, TargetState
from runtime.telemetry.reports import GuessReport, TargetReport


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The fleet at a time in seconds."""

    at: float
    fleet: Fleet


@dataclass(frozen=True, slots=True)
class GuessTotals:
    """Guesses of one or several drafters, by all targets together.

    acceptance  accepted, as a share of proposed
    round_trip  mean seconds, weighted by proposed guesses
    lead        mean lead, weighted by proposed guesses
    """

    proposed: int
    accepted: int
    acceptance: float
    round_trip: float
    lead: float
    resting: bool


def fleet_tokens_per_second(before: Snapshot, now: Snapshot) -> float:
    """Returns the tokens per second that all targets delivered between two snapshots.

    Tokens of a target that was replaced meanwhile are missing.
    """
    last = {life_key(target): target.report for target in before.fleet.targets}
    tokens = 0
    for target in now.fleet.targets:
        earlier = last.get(life_key(target))
        if target.report is not None and earlier is not None:
            tokens += target.report.completion_tokens - earlier.completion_tokens
    return tokens / (now.at - before.at) if now.at > before.at else 0.0


def life_key(target: TargetState) -> tuple[str, int]:
    return target.name, target.incarnation


def sum_guesses(reports: Iterable[GuessReport]) -> GuessTotals:
    found = tuple(reports)
    proposed, accepted = sum(one.proposed for one in found), sum(one.accepted for one in found)
    weight = proposed or 1
    return GuessTotals(
        proposed,
        accepted,
        accepted / weight,
        sum(one.round_trip * one.proposed for one in found) / weight,
        sum(one.lead * one.proposed for one in found) / weight,
        bool(found) and all(one.resting for one in found),
    )


def drafter_guesses(fleet: Fleet, name: str) -> GuessTotals:
    """Returns the guesses of a drafter or head."""
    return sum_guesses(
        report.guesses[name] for report in target_reports(fleet) if name in report.guesses
    )


def target_reports(fleet: Fleet) -> list[TargetReport]:
    return [target.report for target in fleet.targets if target.report is not None]


def status_json(before: Snapshot, now: Snapshot) -> dict[str, Any]:
    """Returns the fleet, with the figures that the tables show."""
    found = asdict(now.fleet)
    for drafter in found["drafters"]:
        drafter["guesses"] = asdict(drafter_guesses(now.fleet, drafter["name"]))
    found["heads"] = [
        {"name": name, "guesses": asdict(drafter_guesses(now.fleet, name))}
        for name in now.fleet.heads
    ]
    return found | {
        "tokens_per_second": fleet_tokens_per_second(before, now),
        "sessions": sum(target.sessions for target in now.fleet.targets),
    }


def render_status(before: Snapshot, now: Snapshot) -> RenderableType:
    fleet = now.fleet
    sessions = sum(target.sessions for target in fleet.targets)
    delivered, lost = (
        f"{fleet_tokens_per_second(before, now):.1f} tokens/s",
        f"{fleet.replaced} lives lost",
    )
    head = Text(
        "  ".join(
            [
                fleet.served_model,
                delivered,
                f"{sessions} sessions",
                lost,
                f"outrider {fleet.version}",
            ]
        ),
        style="bold",
    )
    parts = [head, *(Text(f"gateway {url}/v1") for url in fleet.gateways)]
    return Group(
        *parts, Text(), target_table(fleet), Text(), *head_tables(fleet), *drafter_tables(fleet)
    )


def target_table(fleet: Fleet) -> Table:
    found = borderless_table(
        "target", "state", "sessions", "waiting", "tokens/step", "accepted", "KV", "lost", ""
    )
    for target in fleet.targets:
        report = target.report or TargetReport()
        found.add_row(
            target.name,
            target.state,
            str(report.live),
            str(report.waiting),
            format_ratio(report.completion_tokens, report.rounds, "{:.2f}"),
            format_ratio(report.accepted, report.verified, "{:.0%}"),
            format_ratio(report.kv_used, report.kv_slots, "{:.0%}"),
            str(target.restarts),
            Text(target.trouble, style="yellow"),
        )
    return found


def head_tables(fleet: Fleet) -> list[RenderableType]:
    """Returns the table of heads; nothing if there are none."""
    if not fleet.heads:
        return []
    found = borderless_table("head", "state", "proposed", "accepted", "of them")
    for name in fleet.heads:
        brought = drafter_guesses(fleet, name)
        numbers = (
            str(brought.proposed),
            str(brought.accepted),
            format_ratio(brought.accepted, brought.proposed, "{:.0%}"),
        )
        found.add_row(name, "resting" if brought.resting else "ready", *numbers)
    return [found, Text()]


def drafter_tables(fleet: Fleet) -> list[RenderableType]:
    """Returns the tables of pools and drafters, and the autoscaler's last decisions."""
    if not fleet.pools:
        return []
    pools = borderless_table("pool", "draft", "drafters", "wanted", "from", "to", "by itself")
    for pool in fleet.pools:
        bounds = (str(pool.min), str(pool.max), "yes" if pool.auto else "no")
        pools.add_row(pool.name, short_name(pool.draft), str(pool.ready), str(pool.count), *bounds)
    single = borderless_table(
        "drafter",
        "pool",
        "state",
        "sessions",
        "proposed",
        "accepted",
        "of them",
        "lag",
        "ahead",
        "lost",
        "",
    )
    for drafter in fleet.drafters:
        single.add_row(*drafter_row(drafter, drafter_guesses(fleet, drafter.name)))
    decisions = [Text(str(pool.decision)) for pool in fleet.pools if pool.decision is not None]
    return [pools, Text(), single, *([Text(), *decisions] if decisions else [])]


def drafter_row(drafter: DrafterState, brought: GuessTotals) -> tuple[str | Text, ...]:
    return (
        drafter.name,
        drafter.pool,
        "resting" if brought.resting and drafter.state == "ready" else drafter.state,
        str(drafter.report.sessions if drafter.report else 0),
        str(brought.proposed),
        str(brought.accepted),
        format_ratio(brought.accepted, brought.proposed, "{:.0%}"),
        f"{1000 * brought.round_trip:.1f} ms" if brought.proposed else "-",
        f"{brought.lead:.1f}" if brought.proposed else "-",
        str(drafter.restarts),
        Text(drafter.trouble, style="yellow"),
    )


def short_name(draft: str) -> str:
    """Returns a model's name; the last part if it is a folder."""
    return Path(draft).name if draft.startswith(("/", ".", "~")) else draft


def borderless_table(*columns: str) -> Table:
    """Returns a table with words on the left and numbers on the right."""
    found = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    words = {"target", "pool", "head", "drafter", "draft", "state", ""}
    for column in columns:
        found.add_column(column, justify="left" if column in words else "right")
    return found


def format_ratio(part: float, whole: float, form: str) -> str:
    return form.format(part / whole) if whole else "-"
