"""Targets, drafters and pools as Prometheus reads them, each time it asks: what they have said of themselves last."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from actors.controller.fleet_view import Fleet

Sample = tuple[tuple[str, ...], float]


@dataclass(frozen=True, slots=True)
class Figure:
    """One metric: the values of its labels, and its value, as `samples` finds them in a fleet."""

    name: str
    kind: Literal["counter", "gauge"]
    meaning: str
    labels: tuple[str, ...]
    samples: Callable[[Fleet], Iterable[Sample]]


def target(name: str, kind: Literal["counter", "gauge"], field: str, meaning: str) -> Figure:
    """A field of TargetReport."""

    def samples(fleet: Fleet) -> Iterator[Sample]:
        for found in fleet.targets:
            if found.report is not None:
                yield (found.name,), float(getattr(found.report, field))

    return Figure(f"outrider:target_{name}", kind, meaning, ("target",), samples)


def parted(name: str, field: str, label: str, meaning: str) -> Figure:
    """A field of TargetReport that counts by something."""

    def samples(fleet: Fleet) -> Iterator[Sample]:
        for found in fleet.targets:
            if found.report is not None:
                for key, count in getattr(found.report, field).items():
                    yield (found.name, key), float(count)

    return Figure(f"outrider:target_{name}", "counter", meaning, ("target", label), samples)


def guess(name: str, kind: Literal["counter", "gauge"], field: str, meaning: str) -> Figure:
    """A field of GuessReport."""

    def samples(fleet: Fleet) -> Iterator[Sample]:
        for found in fleet.targets:
            if found.report is not None:
                for drafter, report in found.report.guesses.items():
                    yield (found.name, drafter, pool_of(fleet, drafter)), float(getattr(report, field))

    return Figure(f"outrider:drafter_{name}", kind, meaning, ("target", "drafter", "pool"), samples)


def drafter(name: str, kind: Literal["counter", "gauge"], field: str, meaning: str) -> Figure:
    """A field of DrafterReport."""

    def samples(fleet: Fleet) -> Iterator[Sample]:
        for found in fleet.drafters:
            if found.report is not None:
                yield (found.name, found.pool), float(getattr(found.report, field))

    return Figure(f"outrider:drafter_{name}", kind, meaning, ("drafter", "pool"), samples)


def pool_of(fleet: Fleet, name: str) -> str:
    """ "" for a drafter that is gone."""
    return next((found.pool for found in fleet.drafters if found.name == name), "")


FIGURES = (
    target("live_sessions", "gauge", "live", "Sessions that are being generated"),
    target("waiting_sessions", "gauge", "waiting", "Sessions that wait for KV memory"),
    target("kv_used_slots", "gauge", "kv_used", "KV memory in use, in tokens"),
    target("kv_slots", "gauge", "kv_slots", "KV memory, in tokens"),
    target("steps_total", "counter", "steps", "Forward passes"),
    target("rounds_total", "counter", "rounds", "Forward passes, counted once for each session in them"),
    target("rows_total", "counter", "rows", "Rows of forward passes"),
    target("prompt_tokens_total", "counter", "prompt_tokens", "Prompt tokens taken in"),
    target("reused_tokens_total", "counter", "reused_tokens", "Prompt tokens whose keys and values were there already"),
    target("completion_tokens_total", "counter", "completion_tokens", "Tokens generated"),
    target("drafted_tokens_total", "counter", "drafted", "Draft tokens that arrived and were put into a tree"),
    target("verified_tokens_total", "counter", "verified", "Draft tokens that were given a row"),
    target("accepted_tokens_total", "counter", "accepted", "Draft tokens that were accepted and delivered"),
    target("rejected_tokens_total", "counter", "rejected", "Draft tokens that were verified and not delivered"),
    target("expired_tokens_total", "counter", "expired", "Draft tokens that were dropped without a row"),
    target("wait_seconds_total", "counter", "waited", "Time in which the target waited for drafts"),
    target("compute_seconds_total", "counter", "computed", "Time in which the target's model computed"),
    target("bookkeeping_seconds_total", "counter", "bookkeeping", "Time of the target's steps beside the model's"),
    target("prefill_seconds_total", "counter", "prefilled", "Time in which the target read prompts"),
    Figure(
        "outrider:target_accepted_tokens_per_pos_total",
        "counter",
        "Draft tokens accepted, by their place on the path, from 0",
        ("target", "position"),
        lambda fleet: (
            ((found.name, str(position)), float(count))
            for found in fleet.targets
            if found.report is not None
            for position, count in enumerate(found.report.accepted_at)
        ),
    ),
    parted("sessions_finished_total", "finished", "finished_reason", "Sessions that ended, by reason"),
    parted("fallbacks_total", "fallbacks", "cause", "Steps that did without something, by cause"),
    parted("lost_links_total", "lost_links", "drafter", "Connections to a drafter that ended: lost, or let go by scaling"),
    Figure(
        "outrider:target_restarts_total",
        "counter",
        "Lives of a target that were lost and followed by another",
        ("target",),
        lambda fleet: (((found.name,), float(found.restarts)) for found in fleet.targets),
    ),
    Figure(
        "outrider:target_ready",
        "gauge",
        "1 where the target takes new sessions",
        ("target",),
        lambda fleet: (((found.name,), float(found.state == "ready")) for found in fleet.targets),
    ),
    guess("proposed_tokens_total", "counter", "proposed", "Draft tokens that arrived and were put into a tree"),
    guess("accepted_tokens_total", "counter", "accepted", "Draft tokens that were accepted and delivered"),
    guess("late_tokens_total", "counter", "late", "Draft tokens that arrived after the text had passed them"),
    guess("stale_tokens_total", "counter", "stale", "Draft tokens for a session, an epoch or a parent that was gone"),
    guess("lead_tokens", "gauge", "lead", "Mean tokens that its tree is ahead when a step begins"),
    guess("round_trip_seconds", "gauge", "round_trip", "From a commit to the first growth on it, moving average"),
    guess("resting", "gauge", "resting", "1 where it has brought nothing for long and has no share at present"),
    drafter("sessions", "gauge", "sessions", "Sessions that it guesses for"),
    drafter("passes_total", "counter", "passes", "Forward passes"),
    drafter("nodes_total", "counter", "nodes", "Draft tokens guessed"),
    drafter("compute_seconds_total", "counter", "computed", "Time in which the drafter computed"),
    Figure(
        "outrider:drafter_ignored_messages_total",
        "counter",
        "Messages that a drafter got and that had no effect, by reason",
        ("drafter", "pool", "reason"),
        lambda fleet: (
            ((found.name, found.pool, reason), float(count))
            for found in fleet.drafters
            if found.report is not None
            for reason, count in found.report.counters.items()
        ),
    ),
    Figure(
        "outrider:drafter_restarts_total",
        "counter",
        "Lives of a drafter that were lost and followed by another",
        ("drafter", "pool"),
        lambda fleet: (((found.name, found.pool), float(found.restarts)) for found in fleet.drafters),
    ),
    Figure(
        "outrider:drafter_ready",
        "gauge",
        "1 where the drafter takes new sessions",
        ("drafter", "pool"),
        lambda fleet: (((found.name, found.pool), float(found.state == "ready")) for found in fleet.drafters),
    ),
    Figure(
        "outrider:pool_drafters_wanted",
        "gauge",
        "Drafters that the pool is to have",
        ("pool",),
        lambda fleet: (((found.name,), float(found.count)) for found in fleet.pools),
    ),
    Figure(
        "outrider:pool_drafters_ready",
        "gauge",
        "Drafters of the pool that work",
        ("pool",),
        lambda fleet: (((found.name,), float(found.ready)) for found in fleet.pools),
    ),
    Figure(
        "outrider:lives_lost_total",
        "counter",
        "Lives of targets, drafters and gateways that were lost and followed",
        (),
        lambda fleet: [((), float(fleet.replaced))],
    ),
)


class FleetCollector(Collector):
    """`fleet` gives what is known, None while that is nothing."""

    def __init__(self, fleet: Callable[[], Fleet | None]) -> None:
        self.fleet = fleet

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        fleet = self.fleet()
        for figure in FIGURES:
            kind = CounterMetricFamily if figure.kind == "counter" else GaugeMetricFamily
            family = kind(figure.name, figure.meaning, labels=figure.labels)
            for labels, value in figure.samples(fleet) if fleet is not None else ():
                family.add_metric(labels, value)
            yield family
