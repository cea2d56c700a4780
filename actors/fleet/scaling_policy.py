"""Decides how many drafters a pool should have. Pure: counters in, decisions out.

The gain of a drafter is measured, not modelled: the pool is tried with one more or one fewer. The
two sizes are compared by accepted tokens per round (a step of one session), which does not change
when sessions come and go, as tokens per second do.
"""

from dataclasses import dataclass, field, replace

# Gains are relative: tokens that one drafter adds, per token that the others deliver.
MIN_GAIN_TO_ADD = 0.05  # a drafter on trial stays from this gain on
MIN_GAIN_TO_KEEP = 0.02  # a drafter leaves below this gain; the gap avoids oscillation
SETTLE_S = 5.0  # after a change until it is measured: trees regrow, calibrations learn
WINDOW_S = 20.0  # minimum length of a window
MIN_ROUNDS = 400  # in a window
IDLE_TIMEOUT_S = 300.0  # without a round until the pool shrinks to its minimum
TRIAL_PAUSE_S = 120.0  # until a trial is repeated; doubled by each that has changed nothing
MAX_TRIAL_PAUSE_S = 3600.0
# Trials are due at once when the sessions in a step have changed by this factor.
LOAD_CHANGE_FACTOR = 2.0


@dataclass(frozen=True, slots=True)
class Sample:
    """Counters of all targets together since their start.

    at        clock, in seconds
    ready     drafters of the pool that are ready
    accepted  delivered tokens that any drafter had guessed
    own       delivered tokens that this pool had guessed
    busy      seconds that targets spent on steps
    """

    at: float
    ready: int
    steps: int
    rounds: int
    accepted: int
    own: int
    busy: float


@dataclass(frozen=True, slots=True)
class WindowStats:
    """Statistics of one window.

    accepted  accepted tokens per round, of all drafters
    own       accepted tokens per round, of the pool
    sessions  mean sessions in a step
    rate      rounds per busy second
    """

    accepted: float
    own: float
    sessions: float
    rate: float


@dataclass(frozen=True, slots=True)
class Decision:
    """Why the count of a pool was changed.

    gain   tokens per second that the drafter in question brings, as measured; None if not known yet
    worth  tokens per second that it would have to bring
    speed  tokens per second that are delivered
    """

    pool: str
    at: float
    before: int
    after: int
    why: str
    gain: float | None = None
    worth: float | None = None
    speed: float | None = None

    def __str__(self) -> str:
        numbers = {"gain": self.gain, "worth": self.worth, "of": self.speed}
        figures = ", ".join(
            f"{name} {value:.1f} tokens/s" for name, value in numbers.items() if value is not None
        )
        details = f"{self.why}; {figures}" if figures else self.why
        return f"pool {self.pool}: {self.before} -> {self.after} drafters ({details})"


@dataclass(frozen=True, slots=True)
class Trial:
    """A trial with one drafter more or fewer than `before`."""

    before: int
    measured: WindowStats  # with `before` drafters drafters drafters drafters


@dataclass(frozen=True, slots=True)
class ScalingState:
    """State of one pool between two samples.

    since      start of the window
    worked_at  clock of the last sample with new rounds
    sessions   mean sessions in a step at the last settled window
    resting    count to restore when there is work again
    due        clock when a trial with this many drafters may be made
    pauses     seconds that the trial was postponed by last
    """

    count: int
    since: Sample | None = None
    worked_at: float | None = None
    rounds: int = 0
    sessions: float = 0.0
    trial: Trial | None = None
    resting: int | None = None
    due: dict[int, float] = field(default_factory=dict)
    pauses: dict[int, float] = field(default_factory=dict)


def decide_size(
    pool: str, min_count: int, max_count: int, known: ScalingState, sample: Sample
) -> tuple[ScalingState, Decision | None]:
    """Returns the state after this sample, and a decision if the count changes.

    Samples come in order of time, some seconds apart.
    """
    works = known.worked_at is None or sample.rounds > known.rounds
    known = replace(known, rounds=sample.rounds, worked_at=sample.at if works else known.worked_at)
    if not min_count <= known.count <= max_count:
        return change_count(
            known, pool, sample, clamp(min_count, known.count, max_count), "outside its bounds"
        )
    if known.resting is not None:
        return (
            change_count(
                known,
                pool,
                sample,
                clamp(min_count, known.resting, max_count),
                "there is work again",
            )
            if works
            else (known, None)
        )
    if sample.at - (known.worked_at or 0.0) > IDLE_TIMEOUT_S:
        if known.count == min_count:
            return replace(known, since=None, trial=None), None
        before = known.trial.before if known.trial else known.count
        return change_count(
            known, pool, sample, min_count, f"no work for {IDLE_TIMEOUT_S:g} s", resting=before
        )
    measured, known = measure_window(known, sample)
    if measured is None:
        return known, None
    if known.trial is not None:
        return judge_trial(pool, known, known.trial, measured, sample)
    return begin_trial(pool, min_count, max_count, known, measured, sample)


def measure_window(known: ScalingState, sample: Sample) -> tuple[WindowStats | None, ScalingState]:
    """Returns the statistics of the window once it is long enough.

    The window starts when all drafters of the pool are ready and have settled.
    """
    begun = known.since
    if sample.ready != known.count:
        return None, replace(known, since=None)
    if begun is None:
        return None, replace(known, since=replace(sample, at=sample.at + SETTLE_S))
    if (
        sample.at <= begun.at
        or sample.rounds < begun.rounds
        or sample.accepted < begun.accepted
        or sample.own < begun.own
    ):
        # Still settling, or a target has left with its counters.
        return None, replace(known, since=replace(sample, at=max(begun.at, sample.at)))
    rounds, steps, busy = (
        sample.rounds - begun.rounds,
        sample.steps - begun.steps,
        sample.busy - begun.busy,
    )
    if sample.at - begun.at < WINDOW_S or rounds < MIN_ROUNDS or steps <= 0 or busy <= 0.0:
        return None, known
    found = WindowStats(
        (sample.accepted - begun.accepted) / rounds,
        (sample.own - begun.own) / rounds,
        rounds / steps,
        rounds / busy,
    )
    return found, replace(known, since=sample)


def judge_trial(
    pool: str, known: ScalingState, trial: Trial, measured: WindowStats, sample: Sample
) -> tuple[ScalingState, Decision | None]:
    """Ends a trial: keeps its count, or restores the one before."""
    grown = known.count > trial.before
    few, many = (trial.measured, measured) if grown else (measured, trial.measured)
    gain, bar = relative_gain(few, many), MIN_GAIN_TO_ADD if grown else MIN_GAIN_TO_KEEP
    settled = replace(known, trial=None, sessions=measured.sessions)
    if (gain >= bar) == grown:
        return postpone_trial(replace(settled, pauses={}), trial.before, sample.at), None
    speed = (1.0 + few.accepted) * measured.rate
    why = "one more brought too little" if grown else "one fewer was missed"
    return change_count(
        postpone_trial(settled, known.count, sample.at),
        pool,
        sample,
        trial.before,
        why,
        (gain * speed, bar * speed, speed),
    )


def begin_trial(
    pool: str,
    min_count: int,
    max_count: int,
    known: ScalingState,
    measured: WindowStats,
    sample: Sample,
) -> tuple[ScalingState, Decision | None]:
    """Starts a trial if one is due."""
    if not known.sessions:
        known = replace(known, sessions=measured.sessions)
    elif not 1 / LOAD_CHANGE_FACTOR < measured.sessions / known.sessions < LOAD_CHANGE_FACTOR:
        known = replace(known, sessions=measured.sessions, due={}, pauses={})
    speed = (1.0 + measured.accepted) * measured.rate
    fewer, more = known.count - 1, known.count + 1
    if known.count > min_count:
        mean, worth = measured.own * measured.rate / known.count, MIN_GAIN_TO_KEEP * speed
        if mean < worth:  # guesses overlap, so the last drafter brings at most the mean
            return change_count(
                postpone_trial(known, known.count, sample.at),
                pool,
                sample,
                fewer,
                "not worth it",
                (mean, worth, speed),
            )
    for count, why in (
        (more, "to see what one more brings"),
        (fewer, "to see what the last one brings"),
    ):
        if min_count <= count <= max_count and known.due.get(count, 0.0) <= sample.at:
            return change_count(
                known,
                pool,
                sample,
                count,
                why,
                (None, None, speed),
                trial=Trial(known.count, measured),
            )
    return known, None


def relative_gain(few: WindowStats, many: WindowStats) -> float:
    """Returns what the last drafter adds, relative to what a round delivers without it.

    A round delivers the accepted tokens and one of the target.
    """
    return (many.accepted - few.accepted) / (1.0 + few.accepted)


def postpone_trial(known: ScalingState, count: int, now: float) -> ScalingState:
    """Postpones trials with `count` drafters, for twice as long each time."""
    pause = min(MAX_TRIAL_PAUSE_S, 2 * known.pauses.get(count, TRIAL_PAUSE_S / 2))
    return replace(
        known, due=known.due | {count: now + pause}, pauses=known.pauses | {count: pause}
    )


def change_count(
    known: ScalingState,
    pool: str,
    sample: Sample,
    count: int,
    why: str,
    numbers: tuple[float | None, float | None, float | None] = (None, None, None),
    trial: Trial | None = None,
    resting: int | None = None,
) -> tuple[ScalingState, Decision]:
    """Changes the count. `numbers` are gain, worth and speed of the decision."""
    decision = Decision(pool, sample.at, known.count, count, why, *numbers)
    return replace(known, count=count, since=None, trial=trial, resting=resting), decision


def clamp(min_count: int, count: int, max_count: int) -> int:
    return max(min_count, min(max_count, count))
