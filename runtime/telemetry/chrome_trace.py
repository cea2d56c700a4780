"""Merges recordings of several processes into one Chrome trace, for ui.perfetto.dev.

Format: "Trace Event Format",
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU. Perfetto's reader
adds rules (its json_trace_parser_impl.cc and slice_tracker.cc): a thread's name belongs to its tid
alone, so tids are unique among all processes; slices of one thread must not overlap in part; a flow
binds to the slice that is open at its time.
"""

import bisect
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

from runtime.telemetry.tracing import TARGET, WIRE, Count, Flow, Instant, Recording, Span

FORMAT = "outrider"  # what a reader of our own looks for
PHASE_ORDER = (
    "MXiCsf"  # in this order where the times are equal: a slice is open before what binds to it
)

LaneId = tuple[int, str]  # pid, lane
TraceEvent = dict[str, Any]  # one event of the format


class FlowEnd(NamedTuple):
    place: LaneId
    at: int


class FlowArrow(NamedTuple):
    """A message from one lane to another; times in nanoseconds of the merged trace."""

    kind: str
    sent: FlowEnd
    taken: FlowEnd


def to_chrome_trace(parts: Sequence[Recording]) -> TraceEvent:
    """Return the trace as a JSON object.

    Times begin at 0 with the earliest event; keys are replaced by running numbers. Lanes are in the
    order target, drafters by name, wire. Growth and commits become arrows and spans on the wire if
    both ends were recorded; `otherData.unanswered` counts those that nobody received.
    """
    ordered = sorted(parts, key=lambda part: (not is_target(part), part.process))
    shifts = [
        part.offset - ordered[0].offset for part in ordered
    ]  # before times are added: seconds since 1970 have 1e-7 s of precision
    starts = [
        start_of(event) + shift
        for part, shift in zip(ordered, shifts, strict=True)
        for event in part.events
    ]
    origin = min(starts, default=0.0)
    threads: dict[LaneId, int] = {}
    numbers = itertools.count(
        len(ordered) + 2
    )  # a tid equal to a pid would be that process's main thread
    made: list[TraceEvent] = []
    flows: list[tuple[LaneId, Flow, int]] = []
    for pid, (part, shift) in enumerate(zip(ordered, shifts, strict=True), start=1):
        made += process_metadata(pid, part.process)
        for lane in sorted(lanes_of(part), key=lambda lane: (lane != TARGET, lane)):
            threads[pid, lane] = next(numbers)
            made += thread_metadata(pid, threads[pid, lane], lane)
        moment = partial(nanoseconds, shift - origin)
        for event in part.events:
            if isinstance(event, Flow):
                flows.append(((pid, event.lane), event, moment(event.at)))
            else:
                made.append(to_trace_event(event, pid, threads, moment))
    arrows, unanswered = match_flows(flows)
    made += flow_events(arrows, made, threads)
    made += wire_events(arrows, len(ordered) + 1, numbers)
    made.sort(
        key=lambda one: (
            one["ph"] != "M",
            one.get("ts", 0),
            PHASE_ORDER.index(one["ph"]),
            -one.get("dur", 0),
        )
    )
    for one in made:
        one |= {field: one[field] / 1000 for field in ("ts", "dur") if field in one}  # microseconds
    other = {
        "format": FORMAT,
        "began": origin + ordered[0].offset if ordered else 0.0,
        "cut": any(part.cut for part in ordered),
        "unanswered": unanswered,
    }
    return {"traceEvents": made, "displayTimeUnit": "ms", "otherData": other}


def to_trace_event(
    event: Span | Instant | Count,
    pid: int,
    threads: Mapping[LaneId, int],
    moment: Callable[[float], int],
) -> TraceEvent:
    match event:
        case Span(lane=lane, name=name, began=began, ended=ended, figures=figures):
            return complete_event(
                pid, threads[pid, lane], name, moment(began), moment(ended), figures
            )
        case Instant(lane=lane, name=name, at=at, figures=figures):
            return {
                "ph": "i",
                "s": "t",
                "pid": pid,
                "tid": threads[pid, lane],
                "name": name,
                "ts": moment(at),
                "args": figures,
            }
        case Count(name=name, at=at, value=value):
            return {"ph": "C", "pid": pid, "name": name, "ts": moment(at), "args": {"value": value}}


def lanes_of(part: Recording) -> set[str]:
    return {event.lane for event in part.events if not isinstance(event, Count)}


def is_target(part: Recording) -> bool:
    return TARGET in lanes_of(part)


def start_of(event: Span | Instant | Count | Flow) -> float:
    return event.began if isinstance(event, Span) else event.at


def nanoseconds(shift: float, seconds: float) -> int:
    return round((seconds + shift) * 1e9)


def process_metadata(pid: int, name: str) -> list[TraceEvent]:
    common = {"ph": "M", "pid": pid}
    return [
        common | {"name": "process_name", "args": {"name": name}},
        common | {"name": "process_sort_index", "args": {"sort_index": pid}},
    ]


def thread_metadata(pid: int, tid: int, name: str) -> list[TraceEvent]:
    common = {"ph": "M", "pid": pid, "tid": tid}
    return [
        common | {"name": "thread_name", "args": {"name": name}},
        common | {"name": "thread_sort_index", "args": {"sort_index": tid}},
    ]


def complete_event(
    pid: int, tid: int, name: str, began: int, ended: int, figures: dict[str, Any]
) -> TraceEvent:
    return {
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "name": name,
        "ts": began,
        "dur": max(ended - began, 0),
        "args": figures,
    }


def match_flows(
    flows: Iterable[tuple[LaneId, Flow, int]],
) -> tuple[list[FlowArrow], dict[str, int]]:
    """Return pairs of sent and received messages by time of sending, and counts of unreceived ones.

    The n-th end in a lane belongs to the n-th beginning with that key: a message sent again has the
    same key.
    """
    begun: defaultdict[tuple[str, int], list[FlowEnd]] = defaultdict(list)
    ended: defaultdict[tuple[str, int, LaneId], list[FlowEnd]] = defaultdict(list)
    for place, flow, at in sorted(flows, key=itemgetter(2)):
        end = FlowEnd(place, at)
        if flow.begins:
            begun[flow.kind, flow.key].append(end)
        else:
            ended[flow.kind, flow.key, end.place].append(end)
    answered: set[tuple[str, int, int]] = set()
    arrows: list[FlowArrow] = []
    for (kind, key, _), takings in ended.items():
        for number, (sent, taken) in enumerate(
            zip(begun.get((kind, key), ()), takings, strict=False)
        ):
            arrows.append(FlowArrow(kind, sent, taken))
            answered.add((kind, key, number))
    arrows.sort(key=lambda arrow: arrow.sent.at)
    unanswered: Counter[str] = Counter()
    for (kind, key), sendings in begun.items():
        unanswered[kind] += sum(
            (kind, key, number) not in answered for number in range(len(sendings))
        )
    return arrows, dict(unanswered)


def flow_events(
    arrows: Sequence[FlowArrow], made: Sequence[TraceEvent], threads: Mapping[LaneId, int]
) -> list[TraceEvent]:
    """Return flow events, each at a time when a slice of its lane is open.

    An arrow that would then run backwards is left out.
    """
    slices: dict[int, tuple[list[int], list[int]]] = {tid: ([], []) for tid in threads.values()}
    for event in sorted((event for event in made if event["ph"] == "X"), key=itemgetter("ts")):
        begins, ends = slices[event["tid"]]
        begins.append(event["ts"])
        ends.append(event["ts"] + event["dur"])
    found: list[TraceEvent] = []
    for number, arrow in enumerate(arrows, start=1):
        source, sink = threads[arrow.sent.place], threads[arrow.taken.place]
        sent, taken = (
            open_before(*slices[source], arrow.sent.at),
            open_after(*slices[sink], arrow.taken.at),
        )
        if sent is not None and taken is not None and sent <= taken:
            common = {"name": arrow.kind, "cat": WIRE, "id": number}
            found.append(
                common | {"ph": "s", "pid": arrow.sent.place[0], "tid": source, "ts": sent}
            )
            found.append(
                common
                | {"ph": "f", "bp": "e", "pid": arrow.taken.place[0], "tid": sink, "ts": taken}
            )
    return found


def open_before(begins: Sequence[int], ends: Sequence[int], at: int) -> int | None:
    """Return `at`, or the last moment before it with an open slice: a message follows from earlier
    work.
    """
    last = bisect.bisect_right(begins, at) - 1
    return None if last < 0 else max(begins[last], min(at, ends[last] - 1))


def open_after(begins: Sequence[int], ends: Sequence[int], at: int) -> int | None:
    """Return `at`, or the first moment after it with an open slice: a message affects
    later work.
    """
    last = bisect.bisect_right(begins, at) - 1
    if last >= 0 and at < ends[last]:
        return at
    return begins[last + 1] if last + 1 < len(begins) else None


def wire_events(arrows: Sequence[FlowArrow], pid: int, numbers: Iterable[int]) -> list[TraceEvent]:
    """Return a span for each arrow, on as many threads as there are concurrent messages."""
    made = process_metadata(pid, WIRE)
    free = iter(numbers)
    for kind in sorted({arrow.kind for arrow in arrows}, reverse=True):
        rows: list[tuple[int, int]] = []  # tid, and when its last message was taken in
        for arrow in arrows:
            if arrow.kind == kind:
                sent, taken = arrow.sent.at, arrow.taken.at
                row = next((row for row, (_, until) in enumerate(rows) if until <= sent), len(rows))
                if row == len(rows):
                    rows.append((next(free), 0))
                    made += thread_metadata(pid, rows[row][0], kind)
                rows[row] = (rows[row][0], max(taken, sent))
                # `ms` is negative if the clocks of two machines differ too much.
                figures = {
                    "from": arrow.sent.place[1],
                    "to": arrow.taken.place[1],
                    "ms": (taken - sent) / 1e6,
                }
                made.append(complete_event(pid, rows[row][0], kind, sent, taken, figures))
    return made
