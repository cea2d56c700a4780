"""What people see of a fleet: tables and figures made of what the controller says, and of the difference between two looks."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from actors.controller.fleet_view import DrafterState, Fleet, TargetState
from runtime.telemetry.reports import GuessReport, TargetReport


@dataclass(frozen=True, slots=True)
class Look:
    """The fleet at a time, in seconds."""

    at: float
    fleet: Fleet


@dataclass(frozen=True, slots=True)
class Guessed:
    """Of one drafter or of several, by all targets together. Times in seconds."""

    proposed: int
    accepted: int
    acceptance: float  # of those proposed
    round_trip: float  # mean, by what was proposed
    lead: float
    resting: bool


def speed(before: Look, now: Look) -> float:
    """Tokens per second that all targets delivered between the two looks; those of a target that was replaced meanwhile are missing."""
    last = {life(target): target.report for target in before.fleet.targets}
    tokens = 0
    for target in now.fleet.targets:
        earlier = last.get(life(target))
        if target.report is not None and earlier is not None:
            tokens += target.report.completion_tokens - earlier.completion_tokens
    return tokens / (now.at - before.at) if now.at > before.at else 0.0


def life(target: TargetState) -> tuple[str, int]:
    return target.name, target.incarnation


def guessed(reports: Iterable[GuessReport]) -> Guessed:
    found = tuple(reports)
    proposed, accepted = sum(one.proposed for one in found), sum(one.accepted for one in found)
    weight = proposed or 1
    return Guessed(
        proposed,
        accepted,
        accepted / weight,
        sum(one.round_trip * one.proposed for one in found) / weight,
        sum(one.lead * one.proposed for one in found) / weight,
        bool(found) and all(one.resting for one in found),
    )


def of_drafter(fleet: Fleet, name: str) -> Guessed:
    """Or of a head."""
    return guessed(report.guesses[name] for report in reports(fleet) if name in report.guesses)


def reports(fleet: Fleet) -> list[TargetReport]:
    return [target.report for target in fleet.targets if target.report is not None]


def as_json(before: Look, now: Look) -> dict[str, Any]:
    """The fleet as it is, with the figures that tables show."""
    found = asdict(now.fleet)
    for drafter in found["drafters"]:
        drafter["guesses"] = asdict(of_drafter(now.fleet, drafter["name"]))
    found["heads"] = [
        {"name": name, "guesses": asdict(of_drafter(now.fleet, name))} for name in now.fleet.heads
    ]
    return found | {
        "tokens_per_second": speed(before, now),
        "sessions": sum(target.sessions for target in now.fleet.targets),
    }


def shown(before: Look, now: Look) -> RenderableType:
    fleet = now.fleet
    sessions = sum(target.sessions for target in fleet.targets)
    delivered, lost = f"{speed(before, now):.1f} tokens/s", f"{fleet.replaced} lives lost"
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
    return Group(*parts, Text(), targets(fleet), Text(), *heads(fleet), *drafters(fleet))


def targets(fleet: Fleet) -> Table:
    found = table(
        "target", "state", "sessions", "waiting", "tokens/step", "accepted", "KV", "lost", ""
    )
    for target in fleet.targets:
        report = target.report or TargetReport()
        found.add_row(
            target.name,
            target.state,
            str(report.live),
            str(report.waiting),
            ratio(report.completion_tokens, report.rounds, "{:.2f}"),
            ratio(report.accepted, report.verified, "{:.0%}"),
            ratio(report.kv_used, report.kv_slots, "{:.0%}"),
            str(target.restarts),
            Text(target.trouble, style="yellow"),
        )
    return found


def heads(fleet: Fleet) -> list[RenderableType]:
    """A table of what sits on the targets; nothing where nothing does."""
    if not fleet.heads:
        return []
    found = table("head", "state", "proposed", "accepted", "of them")
    for name in fleet.heads:
        brought = of_drafter(fleet, name)
        numbers = (
            str(brought.proposed),
            str(brought.accepted),
            ratio(brought.accepted, brought.proposed, "{:.0%}"),
        )
        found.add_row(name, "resting" if brought.resting else "ready", *numbers)
    return [found, Text()]


def drafters(fleet: Fleet) -> list[RenderableType]:
    """One table of pools, one of drafters, and why pools were changed by themselves."""
    if not fleet.pools:
        return []
    pools = table("pool", "draft", "drafters", "wanted", "from", "to", "by itself")
    for pool in fleet.pools:
        bounds = (str(pool.min), str(pool.max), "yes" if pool.auto else "no")
        pools.add_row(pool.name, short(pool.draft), str(pool.ready), str(pool.count), *bounds)
    single = table(
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
        single.add_row(*row(drafter, of_drafter(fleet, drafter.name)))
    decisions = [Text(str(pool.decision)) for pool in fleet.pools if pool.decision is not None]
    return [pools, Text(), single, *([Text(), *decisions] if decisions else [])]


def row(drafter: DrafterState, brought: Guessed) -> tuple[str | Text, ...]:
    return (
        drafter.name,
        drafter.pool,
        "resting" if brought.resting and drafter.state == "ready" else drafter.state,
        str(drafter.report.sessions if drafter.report else 0),
        str(brought.proposed),
        str(brought.accepted),
        ratio(brought.accepted, brought.proposed, "{:.0%}"),
        f"{1000 * brought.round_trip:.1f} ms" if brought.proposed else "-",
        f"{brought.lead:.1f}" if brought.proposed else "-",
        str(drafter.restarts),
        Text(drafter.trouble, style="yellow"),
    )


def short(draft: str) -> str:
    """A model's name: of a folder the last part."""
    return Path(draft).name if draft.startswith(("/", ".", "~")) else draft


def table(*columns: str) -> Table:
    """Words to the left, numbers to the right."""
    found = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    words = {"target", "pool", "head", "drafter", "draft", "state", ""}
    for column in columns:
        found.add_column(column, justify="left" if column in words else "right")
    return found


def ratio(part: float, whole: float, form: str) -> str:
    return form.format(part / whole) if whole else "-"
