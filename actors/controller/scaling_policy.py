"""How many drafters a pool should have: as many as each still brings more than it is worth. Pure: counters in, decisions out.

What one more drafter brings is measured, not modelled: the pool is tried with one more or one fewer, and the two are compared by
accepted tokens per round (a step of one session), which does not change when sessions come and go as tokens per second do.
"""

from dataclasses import dataclass, field, replace

# Relative gains: tokens that one drafter adds to those that the rest delivers.
WORTH_STARTING = 0.05  # a drafter on trial must bring so much to stay ...
WORTH_KEEPING = 0.02  # ... and one that is there so little to go: between them nothing changes
SETTLE = (
    5.0  # seconds after a change until its effect is measured: trees grow anew, calibrations learn
)
WINDOW = 20.0  # seconds of measuring, at least ...
ROUNDS = 400  # ... and so many rounds
IDLE = 300.0  # seconds without a round after which the pool shrinks to its minimum
PAUSE = (
    120.0  # seconds until the same trial is made again; doubled by each that has changed nothing
)
LONGEST_PAUSE = 3600.0
CROWD = 2.0  # where the sessions of a step have become so many times more or fewer, trials are due at once


@dataclass(frozen=True, slots=True)
class Sample:
    """Counters since some start, of all targets together; `at` and `busy` in seconds.

    ready     drafters of the pool that are at work now
    accepted  tokens delivered that any drafter had guessed; `own`: that this pool's had
    busy      time that targets spent on steps
    """

    at: float
    ready: int
    steps: int
    rounds: int
    accepted: int
    own: int
    busy: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one window: accepted tokens per round of all and of the pool, sessions in a step, rounds per busy second."""

    accepted: float
    own: float
    sessions: float
    rate: float


@dataclass(frozen=True, slots=True)
class Decision:
    """Why a pool's count was changed, in tokens per second: `gain` is what the drafter in question was measured to bring (None: not
    known yet), `worth` what it would have to, `speed` what is delivered."""

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
        said = ", ".join(
            f"{name} {value:.1f} tokens/s" for name, value in numbers.items() if value is not None
        )
        return f"pool {self.pool}: {self.before} -> {self.after} drafters ({self.why}{'; ' + said if said else ''})"


@dataclass(frozen=True, slots=True)
class Trial:
    """The pool has `before` drafters more or fewer than it is tried with."""

    before: int
    measured: Measured  # with `before`


@dataclass(frozen=True, slots=True)
class Scaling:
    """What is known of one pool between two samples. `due` and `pauses`: when a trial with so many drafters may be made, and how long
    it rests after that; `resting`: the count to come back to when there is work again."""

    count: int
    since: Sample | None = None  # the window's beginning
    worked_at: float | None = None
    rounds: int = 0
    sessions: float = 0.0  # in a step, when it last settled
    trial: Trial | None = None
    resting: int | None = None
    due: dict[int, float] = field(default_factory=dict)
    pauses: dict[int, float] = field(default_factory=dict)


def step(
    pool: str, least: int, most: int, known: Scaling, sample: Sample
) -> tuple[Scaling, Decision | None]:
    """What is known after this sample, and whether the count changes. Samples come in order of time, some seconds apart."""
    works = known.worked_at is None or sample.rounds > known.rounds
    known = replace(known, rounds=sample.rounds, worked_at=sample.at if works else known.worked_at)
    if not least <= known.count <= most:
        return changed(known, pool, sample, between(least, known.count, most), "outside its bounds")
    if known.resting is not None:
        return (
            changed(known, pool, sample, between(least, known.resting, most), "there is work again")
            if works
            else (known, None)
        )
    if sample.at - (known.worked_at or 0.0) > IDLE:
        if known.count == least:
            return replace(known, since=None, trial=None), None
        before = known.trial.before if known.trial else known.count
        return changed(known, pool, sample, least, f"no work for {IDLE:g} s", resting=before)
    measured, known = observe(known, sample)
    if measured is None:
        return known, None
    if known.trial is not None:
        return judge(pool, known, known.trial, measured, sample)
    return try_next(pool, least, most, known, measured, sample)


def observe(known: Scaling, sample: Sample) -> tuple[Measured | None, Scaling]:
    """What the window shows once it is long enough; it begins when all drafters of the pool are there and have settled."""
    begun = known.since
    if sample.ready != known.count:
        return None, replace(known, since=None)
    if begun is None:
        return None, replace(known, since=replace(sample, at=sample.at + SETTLE))
    if (
        sample.at <= begun.at
        or sample.rounds < begun.rounds
        or sample.accepted < begun.accepted
        or sample.own < begun.own
    ):
        # Still settling, or a target has gone, and its counters with it.
        return None, replace(known, since=replace(sample, at=max(begun.at, sample.at)))
    rounds, steps, busy = (
        sample.rounds - begun.rounds,
        sample.steps - begun.steps,
        sample.busy - begun.busy,
    )
    if sample.at - begun.at < WINDOW or rounds < ROUNDS or steps <= 0 or busy <= 0.0:
        return None, known
    found = Measured(
        (sample.accepted - begun.accepted) / rounds,
        (sample.own - begun.own) / rounds,
        rounds / steps,
        rounds / busy,
    )
    return found, replace(known, since=sample)


def judge(
    pool: str, known: Scaling, trial: Trial, measured: Measured, sample: Sample
) -> tuple[Scaling, Decision | None]:
    """The trial is over: keep what was tried, or go back."""
    grown = known.count > trial.before
    few, many = (trial.measured, measured) if grown else (measured, trial.measured)
    gain, bar = relative(few, many), WORTH_STARTING if grown else WORTH_KEEPING
    settled = replace(known, trial=None, sessions=measured.sessions)
    if (gain >= bar) == grown:
        return postponed(replace(settled, pauses={}), trial.before, sample.at), None
    speed = (1.0 + few.accepted) * measured.rate
    why = "one more brought too little" if grown else "one fewer was missed"
    return changed(
        postponed(settled, known.count, sample.at),
        pool,
        sample,
        trial.before,
        why,
        (gain * speed, bar * speed, speed),
    )


def try_next(
    pool: str, least: int, most: int, known: Scaling, measured: Measured, sample: Sample
) -> tuple[Scaling, Decision | None]:
    """Settled: begin the trial that is due, if one is."""
    if not known.sessions:
        known = replace(known, sessions=measured.sessions)
    elif not 1 / CROWD < measured.sessions / known.sessions < CROWD:
        known = replace(known, sessions=measured.sessions, due={}, pauses={})
    speed = (1.0 + measured.accepted) * measured.rate
    fewer, more = known.count - 1, known.count + 1
    if known.count > least:
        mean, worth = measured.own * measured.rate / known.count, WORTH_KEEPING * speed
        if (
            mean < worth
        ):  # guesses of several overlap: the last drafter brings no more than the mean
            return changed(
                postponed(known, known.count, sample.at),
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
        if least <= count <= most and known.due.get(count, 0.0) <= sample.at:
            return changed(
                known,
                pool,
                sample,
                count,
                why,
                (None, None, speed),
                trial=Trial(known.count, measured),
            )
    return known, None


def relative(few: Measured, many: Measured) -> float:
    """Tokens that the last drafter adds, as a part of what a round delivers without it (its accepted ones and the target's own)."""
    return (many.accepted - few.accepted) / (1.0 + few.accepted)


def postponed(known: Scaling, count: int, now: float) -> Scaling:
    """No trial with `count` drafters for a while; for longer with each time."""
    pause = min(LONGEST_PAUSE, 2 * known.pauses.get(count, PAUSE / 2))
    return replace(
        known, due=known.due | {count: now + pause}, pauses=known.pauses | {count: pause}
    )


def changed(
    known: Scaling,
    pool: str,
    sample: Sample,
    count: int,
    why: str,
    numbers: tuple[float | None, float | None, float | None] = (None, None, None),
    trial: Trial | None = None,
    resting: int | None = None,
) -> tuple[Scaling, Decision]:
    """With another count from now on. `numbers`: gain, worth and speed of the decision."""
    decision = Decision(pool, sample.at, known.count, count, why, *numbers)
    return replace(known, count=count, since=None, trial=trial, resting=resting), decision


def between(least: int, count: int, most: int) -> int:
    return max(least, min(most, count))
