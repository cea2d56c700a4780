"""Exposes the latest reports of targets, drafters and pools to Prometheus, at each scrape."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from actors.fleet.fleet_state import Fleet
from runtime.telemetry.reports import DrafterReport, GuessReport, Metric, MetricKind, TargetReport

Labels = tuple[str, ...]
Sample = tuple[Labels, float]


@dataclass(frozen=True, slots=True)
class FleetMetric:
    """A metric: its label names, and the function that finds its samples in a fleet."""

    name: str
    kind: MetricKind
    meaning: str
    labels: Labels
    samples: Callable[[Fleet], Iterable[Sample]]


def report_metrics(
    prefix: str,
    labels: Labels,
    report: type,
    found: Callable[[Fleet], Iterable[tuple[Labels, Any]]],
) -> Iterator[FleetMetric]:
    """Yields a metric for each exposed field of a report.

    `found` returns the reports of a fleet, each with its label values.
    """
    for field in fields(report):
        metric: Metric | None = field.metadata.get("metric")
        if metric is not None:
            names = (*labels, metric.label) if metric.label else labels
            yield FleetMetric(
                f"{prefix}{metric.name}",
                metric.kind,
                metric.meaning,
                names,
                field_samples(field.name, found),
            )


def field_samples(
    name: str, found: Callable[[Fleet], Iterable[tuple[Labels, Any]]]
) -> Callable[[Fleet], Iterable[Sample]]:
    def samples(fleet: Fleet) -> Iterator[Sample]:
        for labels, report in found(fleet):
            for label, value in labelled_values(getattr(report, name)):
                yield labels + label, value

    return samples


def labelled_values(value: Any) -> Iterator[Sample]:
    """Yields the numbers of a field, each with its key or index."""
    match value:
        case dict():
            yield from (((key,), float(count)) for key, count in value.items())
        case tuple():
            yield from (((str(place),), float(count)) for place, count in enumerate(value))
        case _:
            yield (), float(value)


def targets(fleet: Fleet) -> Iterator[tuple[Labels, TargetReport]]:
    return (
        ((target.name,), target.report) for target in fleet.targets if target.report is not None
    )


def guesses(fleet: Fleet) -> Iterator[tuple[Labels, GuessReport]]:
    """Yields the reports on drafters by targets. The pool of a removed drafter is ""."""
    pools = {drafter.name: drafter.pool for drafter in fleet.drafters}
    for (target,), report in targets(fleet):
        for name, guess in report.guesses.items():
            yield (target, name, pools.get(name, "")), guess


def drafters(fleet: Fleet) -> Iterator[tuple[Labels, DrafterReport]]:
    return (
        ((drafter.name, drafter.pool), drafter.report)
        for drafter in fleet.drafters
        if drafter.report is not None
    )


FLEET_METRICS = (
    *report_metrics("outrider:target_", ("target",), TargetReport, targets),
    *report_metrics("outrider:drafter_", ("target", "drafter", "pool"), GuessReport, guesses),
    *report_metrics("outrider:drafter_", ("drafter", "pool"), DrafterReport, drafters),
    FleetMetric(
        "outrider:target_restarts_total",
        "counter",
        "Lives of a target that were lost and followed by another",
        ("target",),
        lambda fleet: (((found.name,), float(found.restarts)) for found in fleet.targets),
    ),
    FleetMetric(
        "outrider:target_ready",
        "gauge",
        "1 where the target takes new sessions",
        ("target",),
        lambda fleet: (((found.name,), float(found.state == "ready")) for found in fleet.targets),
    ),
    FleetMetric(
        "outrider:drafter_restarts_total",
        "counter",
        "Lives of a drafter that were lost and followed by another",
        ("drafter", "pool"),
        lambda fleet: (
            ((found.name, found.pool), float(found.restarts)) for found in fleet.drafters
        ),
    ),
    FleetMetric(
        "outrider:drafter_ready",
        "gauge",
        "1 where the drafter takes new sessions",
        ("drafter", "pool"),
        lambda fleet: (
            ((found.name, found.pool), float(found.state == "ready")) for found in fleet.drafters
        ),
    ),
    FleetMetric(
        "outrider:pool_drafters_wanted",
        "gauge",
        "Drafters that the pool is to have",
        ("pool",),
        lambda fleet: (((found.name,), float(found.count)) for found in fleet.pools),
    ),
    FleetMetric(
        "outrider:pool_drafters_ready",
        "gauge",
        "Drafters of the pool that work",
        ("pool",),
        lambda fleet: (((found.name,), float(found.ready)) for found in fleet.pools),
    ),
    FleetMetric(
        "outrider:lives_lost_total",
        "counter",
        "Lives of targets, drafters and gateways that were lost and followed",
        (),
        lambda fleet: [((), float(fleet.replaced))],
    ),
)


class FleetCollector(Collector):
    """A collector. `fleet` returns the fleet, or None while it is unknown."""

    def __init__(self, fleet: Callable[[], Fleet | None]) -> None:
        self.fleet = fleet

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        fleet = self.fleet()
        for metric in FLEET_METRICS:
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(metric.name, metric.meaning, labels=metric.labels)
            for labels, value in metric.samples(fleet) if fleet is not None else ():
                family.add_metric(labels, value)
            yield family
