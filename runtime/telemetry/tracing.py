"""Records events with times, cheaply enough to stay in the loops; chrome_trace merges processes.

| lane             | spans (values)                  | instants | counters of the process |
|------------------|---------------------------------|----------|-------------------------|
| TARGET           | COMPUTE (rows, sessions,        |          | ROWS, NODES             |
|                  | accepted), WAIT, BOOKKEEPING,   |          |                         |
|                  | PREFILL (rows)                  |          |                         |
| a drafter's name | STEP (leaves, sessions)         | REROOT   | LEAD                    |
| WIRE             | made by the merge: one per growth and commit, from sent to received |

A recording holds times, counts and keys; no text and no tokens.
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
    """An event with a duration. Spans of one lane are disjoint or nested."""

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
    """`name` has this value until its next count."""

    name: str
    at: float
    value: float


class Flow(NamedTuple):
    """One end of an arrow: a message is sent (`begins`) or received. Both ends share kind
    and key.
    """

    lane: str
    kind: str
    key: Key
    at: float
    begins: bool


Event = Span | Instant | Count | Flow


@dataclass(frozen=True, slots=True)
class Recording:
    """The events of one recorder.

    `offset` added to its times gives seconds since 1970. `cut` is True if older events may be lost
    because the recorder was full.
    """

    process: str
    offset: float
    events: list[Event]
    cut: bool


class StepTimes(Protocol):
    """The times of a step when its forward pass begins: clock readings, and `waited` in seconds."""

    @property
    def opened(self) -> float: ...
    @property
    def waited(self) -> float: ...
    @property
    def began(self) -> float: ...


class Trace:
    """Keeps the newest `most` events of one process; times are seconds of its `time.monotonic`.

    Any thread may record; one thread at a time may drain.
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
        """Record one end of an arrow. A message to several receivers begins once.

        `sent` and `taken` derive kind and key from a message.
        """
        self._events.append(Flow(lane, kind, key, at, begins))

    def sent(self, message: Draft | Commit, at: float, lane: str) -> None:
        self.flow(*flow_key(message), at, lane, begins=True)

    def taken(self, message: Draft | Commit, at: float, lane: str) -> None:
        self.flow(*flow_key(message), at, lane, begins=False)

    def step(self, step: StepTimes, rounds: Sequence[Round], decided: float, done: float) -> None:
        """Record a target's step: its waits, drawn as one at the start, the pass, and
        bookkeeping.
        """
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
        """Return the events since the last call. The recording pickles, without objects of the
        caller.
        """
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
    """Return kind and key of a message's arrow, the same in every process.

    Equal guesses of other drafters and sessions have other keys.
    """
    if isinstance(message, Commit):
        return COMMIT, mix64(message.key, zlib.crc32(message.session.encode()))
    first = mix64(int(message.parents[0]), int(message.tokens[0])) if len(message.tokens) else 0
    return GROWTH, mix64(first, zlib.crc32(f"{message.drafter}/{message.session}".encode()))


def wall_offset(tries: int = 8) -> float:
    """Return the seconds from `time.monotonic` to `time.time`, by the least disturbed reading."""
    readings = []
    for _ in range(tries):
        before, wall, after = time.monotonic(), time.time(), time.monotonic()
        readings.append((after - before, wall - (before + after) / 2))
    return min(readings)[1]
