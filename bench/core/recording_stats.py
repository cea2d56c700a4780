"""Figures from the recordings of one run: the target's decoding time, the drafters' lead, the delay
of the wire."""

import bisect
import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

from bench.core.results import Passes, Steps, steps_of
from runtime.core.messages import Stats
from runtime.telemetry.tracing import (
    BOOKKEEPING,
    COMMIT,
    COMPUTE,
    GROWTH,
    LEAD,
    PREFILL,
    STEP,
    WAIT,
    Count,
    Flow,
    Recording,
    Span,
)


def recorded_steps(stats: Stats, target: Recording, drafters: Sequence[Recording]) -> Steps:
    """Return the step figures of a run with one prompt.

    Counts cover all steps. Times cover decoding only: the first step is excluded, as in
    compare.decode_rate.
    """
    spans = [event for event in target.events if isinstance(event, Span)]
    first = next((number for number, span in enumerate(spans) if span.name == COMPUTE), len(spans))
    times = {
        name: sum(span.ended - span.began for span in spans[first + 1 :] if span.name == name)
        for name in (COMPUTE, WAIT, BOOKKEEPING)
    }
    found = steps_of(stats, mean_lead(target, drafters))
    return found.model_copy(
        update={
            "computed": times[COMPUTE],
            "waited": times[WAIT],
            "bookkeeping": times[BOOKKEEPING],
        }
    )


def mean_lead(target: Recording, drafters: Sequence[Recording]) -> float | None:
    """Return the mean tokens by which the deepest drafter's tree was ahead when a target pass
    began.

    Return None without drafters.
    """
    begins = [
        event.began + target.offset
        for event in target.events
        if isinstance(event, Span) and event.name == COMPUTE
    ]
    if not drafters or not begins:
        return None
    counts = [
        [
            (event.at + part.offset, event.value)
            for event in part.events
            if isinstance(event, Count) and event.name == LEAD
        ]
        for part in drafters
    ]
    return statistics.mean(max(value_at(of_one, at) for of_one in counts) for at in begins)


def value_at(counts: Sequence[tuple[float, float]], at: float) -> float:
    """Return the last value counted by then, or 0 before the first."""
    place = bisect.bisect_right(counts, at, key=lambda count: count[0])
    return counts[place - 1][1] if place else 0.0


def round_trip(parts: Sequence[Recording]) -> float | None:
    """Return the median seconds from target to drafter and back, or None if nothing was exchanged.

    The result is the sum of the medians over commits and over growths that arrived.
    """
    delays = []
    for kind in (COMMIT, GROWTH):
        sent, taken = (
            message_times(parts, kind, begins=True),
            message_times(parts, kind, begins=False),
        )
        delays.append([taken[key] - sent[key] for key in sent.keys() & taken.keys()])
    return sum(statistics.median(of_kind) for of_kind in delays) if all(delays) else None


def recorded_passes(target: Recording, drafters: Sequence[Recording]) -> Passes:
    spans, drafting = spans_by_name(target), [spans_by_name(part)[STEP] for part in drafters]
    computing, apart = spans[COMPUTE], (*spans[WAIT], *spans[PREFILL])
    return Passes(
        target=tuple(
            (int(one.figures["rows"]), int(one.figures["sessions"]), one.ended - one.began)
            for one in computing
        ),
        bookkeeping=sum(
            time_between(one, after, apart) for one, after in itertools.pairwise(computing)
        ),
        messages=sum(
            isinstance(event, Flow) and event.kind == GROWTH and not event.begins
            for event in target.events
        ),
        drafting=tuple(
            (int(one.figures["leaves"]), after.began - one.began)
            for of_one in drafting
            for one, after in itertools.pairwise(of_one)
        ),
        round_trip=round_trip([target, *drafters]),
    )


def time_between(one: Span, after: Span, apart: Iterable[Span]) -> float:
    """Return the seconds between two spans, minus the overlap with the spans `apart`."""
    inside = (min(other.ended, after.began) - max(other.began, one.ended) for other in apart)
    return after.began - one.ended - sum(seconds for seconds in inside if seconds > 0.0)


def spans_by_name(part: Recording) -> defaultdict[str, list[Span]]:
    found: defaultdict[str, list[Span]] = defaultdict(list)
    for event in part.events:
        if isinstance(event, Span):
            found[event.name].append(event)
    return found


def message_times(parts: Sequence[Recording], kind: str, begins: bool) -> dict[int, float]:
    """Return when each message of this kind was sent, or first received, by key; in Unix time."""
    found: dict[int, float] = {}
    for part in parts:
        for event in part.events:
            if isinstance(event, Flow) and event.kind == kind and event.begins is begins:
                found.setdefault(event.key, event.at + part.offset)
    return found
