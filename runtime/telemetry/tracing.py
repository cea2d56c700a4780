"""A recorder of what happens when, cheap enough to be left in the loops; `chrome_trace` puts several processes' recordings together.

| lane             | spans and their figures                    | instants  | counters, of the recording process |
|------------------|--------------------------------------------|-----------|------------------------------------|
| TARGET           | COMPUTE (rows, sessions, accepted), WAIT,  |           | ROWS, NODES                        |
|                  | BOOKKEEPING, PREFILL (rows)                |           |                                    |
| a drafter's name | STEP (leaves, sessions)                    | REROOT    | LEAD                               |
| WIRE             | made when recordings are put together: one for each growth and each commit, from sent to taken in |

A recording holds times, counts and content names; no text and no tokens.
"""

import time
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from runtime.core.messages import Commit, Draft, Key, Round
from runtime.core.node_keys import mix64

TARGET, WIRE = "target", "wire"  # every other lane is a drafter's
COMPUTE, WAIT, BOOKKEEPING, PREFILL = "compute", "wait", "bookkeeping", "prefill"
STEP, REROOT = "step", "re-root"
GROWTH, COMMIT = "growth", "commit"
LEAD, NODES, ROWS = "lead (tokens)", "live nodes", "rows"

MAX_EVENTS = 200_000  # the newest that a recorder keeps; half an hour of 100 steps a second


class Span(NamedTuple):
    """Something that took time. Spans of one lane follow each other or lie within each other."""

    lane: str
    name: str
    began: float
    ended: float
    figures: dict[str, float]


class Instant(NamedTuple):
    lane: str
    name: str
    at: float
    figures: dict[str, float]


class Count(NamedTuple):
    """`name` has this value until the next count of that name."""

    name: str
    at: float
    value: float


class Flow(NamedTuple):
    """One end of an arrow: a message is sent (`begins`) or taken in. The ends of an arrow have the same kind and key."""

    lane: str
    kind: str
    key: Key
    at: float
    begins: bool


Event = Span | Instant | Count | Flow


@dataclass(frozen=True, slots=True)
class Recording:
    """What one recorder has seen. `offset` added to its times gives seconds since 1970; `cut`: it was full, older events may be gone."""

    process: str
    offset: float
    events: list[Event]
    cut: bool


class StepTimes(Protocol):
    """What the target knows of a step when its forward pass begins: readings of the clock, and seconds."""

    @property
    def opened(self) -> float: ...
    @property
    def waited(self) -> float: ...
    @property
    def began(self) -> float: ...


class Trace:
    """The newest `most` events of one process; times are seconds of its `time.monotonic`.

    Any thread may record, one at a time may take.
    """

    __slots__ = ("_events", "offset", "process")

    def __init__(self, process: str, offset: float | None = None, most: int = MAX_EVENTS) -> None:
        self.process = process
        self.offset = wall_offset() if offset is None else offset
        self._events: deque[Event] = deque(maxlen=most)

    def span(self, lane: str, name: str, began: float, ended: float, **figures: float) -> None:
        self._events.append(Span(lane, name, began, ended, figures))

    def instant(self, lane: str, name: str, at: float, **figures: float) -> None:
        self._events.append(Instant(lane, name, at, figures))

    def count(self, name: str, at: float, value: float) -> None:
        self._events.append(Count(name, at, value))

    def flow(self, kind: str, key: Key, at: float, lane: str, begins: bool) -> None:
        """A message to several receivers begins once. `sent` and `taken` find kind and key."""
        self._events.append(Flow(lane, kind, key, at, begins))

    def sent(self, message: Draft | Commit, at: float, lane: str) -> None:
        self.flow(*flow_key(message), at, lane, begins=True)

    def taken(self, message: Draft | Commit, at: float, lane: str) -> None:
        self.flow(*flow_key(message), at, lane, begins=False)

    def step(self, step: StepTimes, rounds: Sequence[Round], decided: float, done: float) -> None:
        """The target's: its waits, which are drawn as one at the beginning, the forward pass, and the bookkeeping around it."""
        packing = min(step.opened + step.waited, step.began)
        rows = len(rounds) + sum(round_.width for round_ in rounds)
        if step.waited > 0.0:
            self.span(TARGET, WAIT, step.opened, packing)
        self.span(TARGET, BOOKKEEPING, packing, step.began)
        accepted = sum(round_.accepted for round_ in rounds)
        self.span(
            TARGET, COMPUTE, step.began, decided, rows=rows, sessions=len(rounds), accepted=accepted
        )
        self.span(TARGET, BOOKKEEPING, decided, done)
        self.count(ROWS, step.began, rows)

    def drain(self) -> Recording:
        """What was recorded since the last call. It pickles, without any of the caller's objects."""
        count = len(self._events)
        # One by one from the left, which is safe beside appends; copying the deque would not be.
        events = [self._events.popleft() for _ in range(count)]
        return Recording(self.process, self.offset, events, cut=count == self._events.maxlen)


class NullTrace(Trace):
    """Records nothing."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__("", 0.0, 1)

    def span(self, lane: str, name: str, began: float, ended: float, **figures: float) -> None:
        pass

    def instant(self, lane: str, name: str, at: float, **figures: float) -> None:
        pass

    def count(self, name: str, at: float, value: float) -> None:
        pass

    def flow(self, kind: str, key: Key, at: float, lane: str, begins: bool) -> None:
        pass

    def sent(self, message: Draft | Commit, at: float, lane: str) -> None:
        pass

    def taken(self, message: Draft | Commit, at: float, lane: str) -> None:
        pass

    def step(self, step: StepTimes, rounds: Sequence[Round], decided: float, done: float) -> None:
        pass


NO_TRACE = NullTrace()


def flow_key(message: Draft | Commit) -> tuple[str, Key]:
    """Kind and key of a message's arrow, the same wherever it is asked; equal guesses of other drafters and sessions have other keys."""
    if isinstance(message, Commit):
        return COMMIT, mix64(message.key, zlib.crc32(message.session.encode()))
    first = mix64(int(message.parents[0]), int(message.tokens[0])) if len(message.tokens) else 0
    return GROWTH, mix64(first, zlib.crc32(f"{message.drafter}/{message.session}".encode()))


def wall_offset(tries: int = 8) -> float:
    """Seconds from `time.monotonic` to `time.time`, by the reading that was disturbed least."""
    readings = []
    for _ in range(tries):
        before, wall, after = time.monotonic(), time.time(), time.monotonic()
        readings.append((after - before, wall - (before + after) / 2))
    return min(readings)[1]
