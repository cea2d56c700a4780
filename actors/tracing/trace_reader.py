"""Reads trace files, and computes statistics of them. Times are seconds since the trace began."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from runtime.core.errors import InvalidRequest
from runtime.telemetry.chrome_trace import FORMAT, to_chrome_trace
from runtime.telemetry.tracing import COMMIT, COMPUTE, GROWTH, STEP, TARGET, WIRE, Recording

Time = Annotated[FiniteFloat, Field(ge=0)]  # microseconds
Interval = tuple[float, float]
EXCERPT_S = 0.5  # length of a picture without a given window


class MetadataEvent(BaseModel):
    ph: Literal["M"]
    name: str
    pid: int
    tid: int = 0
    args: dict[str, str | int]


class CompleteEvent(BaseModel):
    ph: Literal["X"]
    name: str
    pid: int
    tid: int
    ts: Time
    dur: Time
    args: dict[str, FiniteFloat | str]


class InstantEvent(BaseModel):
    ph: Literal["i"]
    name: str
    pid: int
    tid: int
    ts: Time


class CounterEvent(BaseModel):
    ph: Literal["C"]
    name: str
    pid: int
    ts: Time
    args: dict[Literal["value"], FiniteFloat]


class FlowEvent(BaseModel):
    ph: Literal["s", "f"]


class OtherData(BaseModel):
    format: Literal["outrider"]
    cut: bool
    unanswered: dict[str, int]


class Document(BaseModel):
    events: list[
        Annotated[
            MetadataEvent | CompleteEvent | InstantEvent | CounterEvent | FlowEvent,
            Field(discriminator="ph"),
        ]
    ] = Field(alias="traceEvents")
    other: OtherData = Field(alias="otherData")


class Block(NamedTuple):
    """An activity of a lane."""

    name: str
    began: float
    ended: float
    figures: dict[str, float]


class Message(NamedTuple):
    """A message between lanes.

    taken  time of receipt; it is before `sent` if the clocks of two machines disagree
    """

    kind: str
    source: str  # a lane
    sink: str
    sent: float
    taken: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """The content of a trace, without the wire.

    blocks  by lane, in order of time; the lanes in their order
    marks   by lane, in order of time
    counts  by name and process, in order of time
    """

    blocks: dict[str, list[Block]]
    marks: dict[str, list[tuple[str, float]]]
    counts: dict[str, dict[str, list[tuple[float, float]]]]
    messages: list[Message]
    unanswered: dict[str, int]
    cut: bool

    @property
    def drafters(self) -> list[str]:
        return [lane for lane in self.blocks if lane != TARGET]

    @property
    def bounds(self) -> Interval:
        """The interval from the first to the last activity of any lane."""
        return extent([block for lane in self.blocks.values() for block in lane])

    @property
    def run(self) -> Interval:
        """The interval from the first to the last activity of the target, else the bounds."""
        own = self.blocks.get(TARGET)
        return extent(own) if own else self.bounds


def middle_window(found: Timeline) -> Interval:
    """Returns half a second around the middle one of the target's steps.

    The middle in time might fall between two sessions.
    """
    run = found.run
    steps = [block.began for block in found.blocks.get(TARGET, []) if block.name == COMPUTE] or [
        sum(run) / 2
    ]
    begin = max(run[0], min(steps[len(steps) // 2] - EXCERPT_S / 2, run[1] - EXCERPT_S))
    return begin, min(run[1], begin + EXCERPT_S)


def extent(blocks: Sequence[Block]) -> Interval:
    return min(block.began for block in blocks), max(block.ended for block in blocks)


def save_trace(file: Path, parts: Sequence[Recording]) -> None:
    """Writes the recordings as one trace. Raises InvalidRequest if the file cannot be written."""
    try:
        file.write_text(json.dumps(to_chrome_trace(parts), separators=(",", ":")), "utf-8")
    except OSError as error:
        raise InvalidRequest(
            f"cannot write the trace to {file} ({error.strerror}): give a file in a folder that "
            "exists",
            "trace",
        ) from error


def read_trace(file: Path) -> Timeline:
    """Reads a trace file. Raises InvalidRequest if it is unreadable, not a trace, or empty."""
    try:
        document = Document.model_validate_json(file.read_bytes())
    except OSError as error:
        raise InvalidRequest(
            f"cannot read {file} ({error.strerror}): give a file written by `--trace`", "file"
        ) from error
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        if first["type"] == "json_invalid":
            raise InvalidRequest(
                f"{file} is invalid JSON ({first['msg']}): give a file written by `--trace`",
                "file",
            ) from error
        where = ".".join(map(str, first["loc"])) or "document"
        raise InvalidRequest(
            f"{file} is not a trace of {FORMAT} ({where}: {first['msg']}): give a file written by "
            "`--trace`",
            "file",
        ) from error
    found = build_timeline(document)
    if not any(found.blocks.values()):
        raise InvalidRequest(
            f"{file} is an empty trace: neither the target nor a drafter was active in it",
            "file",
        )
    return found


def build_timeline(document: Document) -> Timeline:
    processes: dict[int, str] = {}
    lanes: dict[int, str] = {}
    for event in document.events:
        if isinstance(event, MetadataEvent) and event.name == "process_name":
            processes[event.pid] = str(event.args.get("name", ""))
        elif isinstance(event, MetadataEvent) and event.name == "thread_name":
            lanes[event.tid] = str(event.args.get("name", ""))
    wires = {pid for pid, name in processes.items() if name == WIRE}
    blocks: defaultdict[str, list[Block]] = defaultdict(list)
    marks: defaultdict[str, list[tuple[str, float]]] = defaultdict(list)
    counts: defaultdict[str, defaultdict[str, list[tuple[float, float]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    messages: list[Message] = []
    for event in document.events:
        match event:
            case CompleteEvent(pid=pid, name=kind, ts=ts, args=args) if pid in wires:
                delay = args.get("ms", 0.0)
                if isinstance(delay, float):
                    messages.append(
                        Message(
                            kind,
                            str(args.get("from")),
                            str(args.get("to")),
                            ts / 1e6,
                            ts / 1e6 + delay / 1e3,
                        )
                    )
            case CompleteEvent(tid=tid, name=name, ts=ts, dur=dur, args=args):
                figures = {name: value for name, value in args.items() if isinstance(value, float)}
                blocks[lanes.get(tid, str(tid))].append(
                    Block(name, ts / 1e6, (ts + dur) / 1e6, figures)
                )
            case InstantEvent(tid=tid, name=name, ts=ts):
                marks[lanes.get(tid, str(tid))].append((name, ts / 1e6))
            case CounterEvent(pid=pid, name=name, ts=ts, args=args):
                counts[name][processes.get(pid, str(pid))].extend(
                    (ts / 1e6, value) for value in args.values()
                )
            case _:
                pass
    order = sorted(blocks.keys() | marks.keys(), key=lambda lane: (lane != TARGET, lane))
    return Timeline(
        blocks={lane: sorted(blocks[lane], key=lambda block: block.began) for lane in order},
        marks={lane: sorted(marks[lane], key=lambda mark: mark[1]) for lane in order},
        counts={
            name: {process: sorted(values) for process, values in of.items()}
            for name, of in counts.items()
        },
        messages=messages,
        unanswered=document.other.unanswered,
        cut=document.other.cut,
    )


@dataclass(frozen=True, slots=True)
class DelayStats:
    """Seconds from sent to received of one kind of message; NaN if there are none."""

    count: int
    median: float
    least: float


@dataclass(frozen=True, slots=True)
class TraceStats:
    """Shares of the time of one window.

    target    by name of the activity; "other" is the rest
    drafters  in a step, by drafter
    overlap   the target in a forward pass and some drafter in a step
    """

    target: dict[str, float]
    drafters: dict[str, float]
    overlap: float
    delays: dict[str, DelayStats]


def trace_stats(found: Timeline, window: Interval) -> TraceStats:
    seconds = window[1] - window[0]
    own = found.blocks.get(TARGET, [])
    names = dict.fromkeys(block.name for block in own)
    shares = {name: total_length(busy_intervals(own, name, window)) / seconds for name in names}
    steps = {lane: busy_intervals(found.blocks[lane], STEP, window) for lane in found.drafters}
    together = intersection(
        busy_intervals(own, COMPUTE, window),
        union(interval for intervals in steps.values() for interval in intervals),
    )
    return TraceStats(
        target=shares | {"other": max(0.0, 1.0 - sum(shares.values()))},
        drafters={lane: total_length(intervals) / seconds for lane, intervals in steps.items()},
        overlap=total_length(together) / seconds,
        delays={kind: delay_stats(found.messages, kind, window) for kind in (GROWTH, COMMIT)},
    )


def busy_intervals(blocks: Iterable[Block], name: str, window: Interval) -> list[Interval]:
    """Returns when a block of this name was open in the window, as disjoint intervals."""
    clipped = (
        (max(block.began, window[0]), min(block.ended, window[1]))
        for block in blocks
        if block.name == name
    )
    return union(interval for interval in clipped if interval[0] < interval[1])


def union(intervals: Iterable[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for began, ended in sorted(intervals):
        if merged and began <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], ended))
        else:
            merged.append((began, ended))
    return merged


def intersection(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """Returns when both are open; each must be as `union` returns it."""
    found: list[Interval] = []
    i = j = 0
    while i < len(one) and j < len(other):
        began, ended = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if began < ended:
            found.append((began, ended))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return found


def total_length(intervals: Iterable[Interval]) -> float:
    return sum(ended - began for began, ended in intervals)


def delay_stats(messages: Iterable[Message], kind: str, window: Interval) -> DelayStats:
    """Returns the delays of the messages sent within the window."""
    delays = [
        message.taken - message.sent
        for message in messages
        if message.kind == kind and window[0] <= message.sent <= window[1]
    ]
    return DelayStats(
        len(delays),
        statistics.median(delays) if delays else math.nan,
        min(delays, default=math.nan),
    )
