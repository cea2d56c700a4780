"""The recorder, and the merging of recordings into one Chrome trace."""

import json
import pickle
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from runtime.core.messages import Commit, Draft, Round
from runtime.telemetry.chrome_trace import to_chrome_trace
from runtime.telemetry.tracing import (
    BOOKKEEPING,
    COMMIT,
    COMPUTE,
    GROWTH,
    LEAD,
    MAX_EVENTS,
    NO_TRACE,
    NODES,
    PREFILL,
    REROOT,
    ROWS,
    STEP,
    TARGET,
    WAIT,
    Count,
    Flow,
    Recording,
    Span,
    Trace,
    flow_key,
    wall_offset,
)

SKEW = 1000.0  # between the monotonic clocks of the two synthetic machines
MS = 1e-3


@dataclass(frozen=True, slots=True)
class Opened:
    opened: float
    waited: float
    began: float


def growth(token: int, drafter: str = "draft-0", session: str = "s") -> Draft:
    parents, tokens = np.asarray([2**63 + 11], dtype=np.uint64), np.asarray([token], dtype=np.int32)
    return Draft(session, 0, drafter, parents, tokens, np.zeros(1, dtype=np.float32))


def commit(number: int, session: str = "s") -> Commit:
    return Commit(session, 0, number, (5,), 2**62 + number)


def rounds(width: int, accepted: int) -> list[Round]:
    return [Round("s", 0, width, accepted, True, 0.0, 0.0, 0.0)]


def synthetic(
    steps: int, drafters: Sequence[str] = ("draft-0",), start: float = 50.0
) -> list[Recording]:
    """Records `steps` target steps of 20 ms on two machines.

    A target step is 2 ms of waiting, 16 ms of forward pass and 2 ms of bookkeeping. With each,
    every drafter steps for 8 ms: the first 4 ms into the pass, the second 5 ms into it. Growth
    takes 1 ms, a commit 3 ms.
    """
    target = Trace(TARGET, offset=1.7e9)
    helpers = [Trace(name, offset=1.7e9 + SKEW) for name in drafters]
    target.span(TARGET, PREFILL, start - 10 * MS, start, rows=40)
    for number in range(steps):
        opened = start + number * 20 * MS
        began, decided, done = opened + 2 * MS, opened + 18 * MS, opened + 20 * MS
        target.step(
            Opened(opened, 2 * MS, began), rounds(7 + number % 5, number % 4), decided, done
        )
        target.count(NODES, done, 20 + 11 * number % 17)
        target.sent(commit(number), decided + 0.5 * MS, TARGET)
        for index, helper in enumerate(helpers):
            name, stepped = helper.process, began + (4 + index) * MS
            helper.span(name, STEP, stepped - SKEW, stepped + 8 * MS - SKEW, leaves=4, sessions=1)
            helper.count(LEAD, stepped + 8 * MS - SKEW, 3 + (number + index) % 5)
            message = growth(100 * index + number, name)
            helper.sent(message, stepped + 8 * MS - SKEW, name)
            target.taken(message, stepped + 9 * MS, TARGET)
            helper.taken(commit(number), decided + 3.5 * MS - SKEW, name)
            if number % 3 == 2:
                helper.instant(name, REROOT, decided + 3.5 * MS - SKEW)
    return [*(helper.drain() for helper in reversed(helpers)), target.drain()]


def only(trace: dict[str, Any], phase: str) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == phase]


# The recorder


def test_a_ring_keeps_the_newest_and_says_so() -> None:
    trace = Trace("p", offset=0.0, most=3)
    for number in range(5):
        trace.count(ROWS, float(number), number)
    taken = trace.drain()
    assert taken == Recording(
        "p", 0.0, [Count(ROWS, 2.0, 2), Count(ROWS, 3.0, 3), Count(ROWS, 4.0, 4)], cut=True
    )
    trace.count(ROWS, 5.0, 5)
    assert trace.drain() == Recording("p", 0.0, [Count(ROWS, 5.0, 5)], cut=False)


def test_threads_record_beside_a_taker_and_nothing_is_lost() -> None:
    trace, each, seen = Trace("p", offset=0.0), 5000, list[float]()
    together = threading.Barrier(4)

    def record(first: int) -> None:
        together.wait()
        for number in range(first, first + each):
            trace.count(ROWS, 0.0, number)

    threads = [threading.Thread(target=record, args=(index * each,)) for index in range(3)]
    for thread in threads:
        thread.start()
    together.wait()
    while any(thread.is_alive() for thread in threads):
        seen += [event.value for event in trace.drain().events if isinstance(event, Count)]
    seen += [event.value for event in trace.drain().events if isinstance(event, Count)]
    assert sorted(seen) == list(range(3 * each))


def test_off_records_nothing_through_any_method() -> None:
    NO_TRACE.span(TARGET, COMPUTE, 0.0, 1.0, rows=1)
    NO_TRACE.instant("d", REROOT, 0.0)
    NO_TRACE.count(ROWS, 0.0, 1)
    NO_TRACE.flow(GROWTH, 1, 0.0, "d", begins=True)
    NO_TRACE.sent(growth(1), 0.0, "d")
    NO_TRACE.taken(commit(1), 0.0, "d")
    NO_TRACE.step(Opened(0.0, 0.0, 0.0), rounds(1, 1), 1.0, 2.0)
    assert NO_TRACE.drain().events == []
    inherited = {
        name for name, value in vars(Trace).items() if callable(value) and not name.startswith("_")
    } - set(vars(type(NO_TRACE)))
    assert inherited == {"drain"}


def test_a_step_is_wait_packing_pass_and_bookkeeping_without_gaps() -> None:
    trace = Trace(TARGET, offset=0.0)
    trace.step(Opened(1.0, 0.25, 1.5), [*rounds(3, 2), *rounds(4, 1)], 2.0, 2.5)
    assert trace.drain().events == [
        Span(TARGET, WAIT, 1.0, 1.25, {}),
        Span(TARGET, BOOKKEEPING, 1.25, 1.5, {}),
        Span(TARGET, COMPUTE, 1.5, 2.0, {"rows": 9, "sessions": 2, "accepted": 3}),
        Span(TARGET, BOOKKEEPING, 2.0, 2.5, {}),
        Count(ROWS, 1.5, 9),
    ]


def test_both_sides_name_a_message_alike_and_no_other_one_so() -> None:
    messages: list[Draft | Commit] = [
        growth(1),
        growth(2),
        growth(1, drafter="draft-1"),
        growth(1, session="t"),
        commit(1),
        commit(2),
        commit(1, session="t"),
    ]
    names = [flow_key(message) for message in messages]
    assert [flow_key(pickle.loads(pickle.dumps(message))) for message in messages] == names
    assert len(set(names)) == len(names)
    assert all(0 <= key < 2**64 for _, key in names)


def test_a_recording_pickles() -> None:
    part = synthetic(2)[0]
    assert pickle.loads(pickle.dumps(part)) == part


def test_two_readings_of_the_wall_clock_agree_better_than_a_step_lasts() -> None:
    assert MAX_EVENTS >= 100_000
    assert wall_offset() == pytest.approx(wall_offset(), abs=1.0)


# The format


FIELDS = {
    "M": {"name", "pid", "args"},
    "X": {"name", "pid", "tid", "ts", "dur", "args"},
    "i": {"name", "pid", "tid", "ts", "s"},
    "C": {"name", "pid", "ts", "args"},
    "s": {"name", "cat", "id", "pid", "tid", "ts"},
    "f": {"name", "cat", "id", "pid", "tid", "ts", "bp"},
}


def test_every_event_has_the_documented_fields_and_is_in_order() -> None:
    trace = json.loads(json.dumps(to_chrome_trace(synthetic(20, ("draft-0", "draft-1")))))
    events = trace["traceEvents"]
    assert {event["ph"] for event in events} == set(FIELDS)
    for event in events:
        assert FIELDS[event["ph"]] <= event.keys(), event
        assert isinstance(event["pid"], int)
        assert isinstance(event.get("tid", 0), int)
        assert event.get("ts", 0) >= 0
        assert event.get("dur", 0) >= 0
    timed = [event["ts"] for event in events if event["ph"] != "M"]
    assert timed == sorted(timed)
    assert timed[0] == 0
    assert [event["ph"] for event in events].index("X") == len(only(trace, "M"))
    assert all(
        isinstance(value, int | float)
        for event in only(trace, "C")
        for value in event["args"].values()
    )
    assert {event["s"] for event in only(trace, "i")} == {"t"}
    assert {event["bp"] for event in only(trace, "f")} == {"e"}
    assert trace["displayTimeUnit"] == "ms"


def test_lanes_are_named_and_stand_in_order_whatever_the_order_of_the_recordings() -> None:
    trace = to_chrome_trace(synthetic(3, ("draft-0", "draft-1")))
    process = {
        event["pid"]: event["args"]["name"]
        for event in only(trace, "M")
        if event["name"] == "process_name"
    }
    order = {
        event["pid"]: event["args"]["sort_index"]
        for event in only(trace, "M")
        if event["name"] == "process_sort_index"
    }
    assert [process[pid] for pid in sorted(process, key=order.__getitem__)] == [
        "target",
        "draft-0",
        "draft-1",
        "wire",
    ]
    threads = [
        (event["pid"], event["tid"]) for event in only(trace, "M") if event["name"] == "thread_name"
    ]
    assert len({tid for _, tid in threads} | set(process)) == len(threads) + len(
        process
    )  # a reader keeps threads by tid alone
    used = {(event["pid"], event["tid"]) for event in trace["traceEvents"] if "tid" in event}
    assert used == set(threads)


def nested(events: Sequence[dict[str, Any]]) -> bool:
    """Whether any two slices of a thread are apart, or one lies within the other."""
    open_until: dict[int, list[float]] = {}
    for event in events:
        until = open_until.setdefault(event["tid"], [])
        while until and until[-1] <= event["ts"]:
            until.pop()
        if until and until[-1] < round(event["ts"] + event["dur"], 3):
            return False
        until.append(round(event["ts"] + event["dur"], 3))
    return True


def test_slices_of_one_thread_never_overlap_in_part_and_arrows_bind_to_open_ones() -> None:
    trace = to_chrome_trace(synthetic(20, ("draft-0", "draft-1")))
    slices = only(trace, "X")
    assert nested(slices)
    begun, ended = (
        {event["id"]: event for event in only(trace, "s")},
        {event["id"]: event for event in only(trace, "f")},
    )
    assert begun.keys() == ended.keys()
    assert (
        len(begun) == len(only(trace, "s")) == 20 * 2 + (20 - 1) * 2
    )  # nobody steps after the last commit
    for number, start in begun.items():
        assert (start["name"], start["cat"]) == (ended[number]["name"], ended[number]["cat"])
        assert start["ts"] <= ended[number]["ts"]
        for end in (start, ended[number]):
            assert any(
                slice_["tid"] == end["tid"]
                and slice_["pid"] == end["pid"]
                and slice_["ts"] <= end["ts"] < slice_["ts"] + slice_["dur"]
                for slice_ in slices
            ), end


def test_messages_under_way_at_one_time_lie_on_different_threads_of_the_wire() -> None:
    sender, receiver = Trace("draft-0", offset=0.0), Trace(TARGET, offset=0.0)
    for number, (sent, taken) in enumerate([(1.0, 4.0), (2.0, 5.0), (4.0, 6.0)]):
        sender.sent(growth(number), sent, "draft-0")
        receiver.taken(growth(number), taken, TARGET)
    slices = only(to_chrome_trace([sender.drain(), receiver.drain()]), "X")
    assert [(event["ts"], event["dur"]) for event in slices] == [(0.0, 3e6), (1e6, 3e6), (3e6, 2e6)]
    assert slices[0]["tid"] == slices[2]["tid"] != slices[1]["tid"]
    assert nested(slices)


def test_machines_line_up_by_their_wall_clocks() -> None:
    trace = to_chrome_trace(synthetic(1))
    began = {event["name"]: event["ts"] for event in only(trace, "X")}
    assert began[COMPUTE] == pytest.approx(
        12_000, abs=1
    )  # after 10 ms of prefill and 2 ms of waiting
    assert began[STEP] == pytest.approx(16_000, abs=1)
    assert trace["otherData"]["began"] == pytest.approx(1.7e9 + 50.0 - 10 * MS)


def test_adjacent_spans_stay_adjacent_long_after_the_machine_was_started() -> None:
    trace, start = Trace(TARGET, offset=1.7e9), 3_000_000.123456789
    for number in range(200):
        trace.span(TARGET, COMPUTE, start + number * 0.0123457, start + (number + 1) * 0.0123457)
    slices = only(to_chrome_trace([trace.drain()]), "X")
    assert nested(slices)
    assert [round(one["ts"] + one["dur"], 3) for one in slices[:-1]] == [
        one["ts"] for one in slices[1:]
    ]


def test_no_content_name_is_left_in_a_trace() -> None:
    parts = synthetic(5)
    keys = {event.key for part in parts for event in part.events if isinstance(event, Flow)}
    written = json.dumps(to_chrome_trace(parts))
    assert len(keys) == 10
    assert [key for key in keys if str(key) in written or f"{key:x}" in written] == []


def test_what_is_sent_twice_under_one_name_is_two_arrows_and_what_nobody_takes_in_is_counted() -> (
    None
):
    sender, receiver, other = (
        Trace(TARGET, offset=0.0),
        Trace("draft-0", offset=0.0),
        Trace("draft-1", offset=0.0),
    )
    for at in (1.0, 2.0):
        sender.sent(commit(1), at, TARGET)
        receiver.taken(commit(1), at + 0.25, "draft-0")
        other.taken(commit(1), at + 0.5, "draft-1")
    sender.sent(commit(2), 3.0, TARGET)
    other.taken(commit(3), 4.0, "draft-1")
    trace = to_chrome_trace([sender.drain(), receiver.drain(), other.drain()])
    delays = [(event["args"]["to"], event["args"]["ms"]) for event in only(trace, "X")]
    assert sorted(delays) == [("draft-0", 250.0)] * 2 + [("draft-1", 500.0)] * 2
    assert trace["otherData"]["unanswered"] == {COMMIT: 1}


def test_nothing_recorded_is_a_trace_too() -> None:
    assert only(to_chrome_trace([]), "X") == []
    assert [event["args"] for event in only(to_chrome_trace([NO_TRACE.drain()]), "M")][:1] == [
        {"name": ""}
    ]
