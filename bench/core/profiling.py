"""The profile of the pair measured alone: T(n), t(w) and acceptance, one model at a time on one
core."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.core.results import Acceptance, Profile, Run
from runtime.core.sampling_params import SamplingParams

TARGET_ROWS = (1, 2, 4, 8, 16, 32, 64)
DRAFT_ROWS = (1, 2, 4, 8, 16, 32)
TEXT_COUNT = 8
REPEATS = 7
BANDWIDTH_NUMBERS = (
    1 << 26
)  # float32 values read to measure the memory bandwidth: more than any cache holds


@dataclass(frozen=True, slots=True)
class ProfileJob:
    """The models to measure; `draft` is None if the drafter is no model of its own."""

    target: str
    draft: str | None
    dtype: str
    core: int


@dataclass(frozen=True, slots=True)
class ProfileResult:
    """The profile, and the parameter counts of target and draft (0 without a draft model)."""

    profile: Profile
    parameters: tuple[int, int]


def profile_pair(job: ProfileJob) -> ProfileResult:
    """Measure the pair. It pins the process to its core, so call it through
    `call_in_subprocess`."""
    os.sched_setaffinity(0, (job.core,))
    from runtime.models.loader import load_model
    from runtime.models.step_timing import step_times, text_time

    target, draft = (
        None if name is None else load_model(name, job.dtype, "cpu", threads=1)
        for name in (job.target, job.draft)
    )
    assert target is not None
    size = sum(weight.nbytes for weight in target.module.parameters())
    profile = Profile(
        target=step_times(target, TARGET_ROWS, time.monotonic, REPEATS),
        draft={} if draft is None else step_times(draft, DRAFT_ROWS, time.monotonic, REPEATS),
        floor=size / memory_bandwidth(),
        text=text_time(target, TEXT_COUNT, time.monotonic, REPEATS),
    )
    counts = [0 if model is None else model.module.num_parameters() for model in (target, draft)]
    return ProfileResult(profile, (counts[0], counts[1]))


def median_profile(profiles: Sequence[Profile]) -> Profile:
    """Return the medians of profiles measured at different times.

    On a shared machine a core may be twice as fast in one minute as in the next.
    """

    def times(of: Callable[[Profile], dict[int, float]]) -> dict[int, float]:
        return {
            rows: statistics.median(of(profile)[rows] for profile in profiles)
            for rows in of(profiles[0])
        }

    def one(of: Callable[[Profile], float | None]) -> float | None:
        known = [found for profile in profiles if (found := of(profile)) is not None]
        return statistics.median(known) if known else None

    return profiles[0].model_copy(
        update={
            "target": times(lambda profile: profile.target),
            "draft": times(lambda profile: profile.draft),
            "floor": one(lambda profile: profile.floor),
            "text": one(lambda profile: profile.text),
        }
    )


@dataclass(frozen=True, slots=True)
class AnsweredRuns:
    """Runs of plain decoding; `seed` is that of their first repetition."""

    job: ProfileJob
    seed: int
    runs: tuple[Run, ...]


def measure_acceptance(answered: AnsweredRuns) -> tuple[Acceptance, ...]:
    """Return how often the draft guesses these answers, by temperature and batch.

    Without a draft model there is nothing to replay. A repeated text counts once. Call it through
    `call_in_subprocess`, as `profile_pair`.
    """
    job, firsts = answered.job, [run for run in answered.runs if run.repetition == 0]
    if job.draft is None:
        return ()
    os.sched_setaffinity(0, (job.core,))
    from runtime.models.acceptance import replay_draft
    from runtime.models.loader import load_model
    from runtime.sim.pair_profile import positions

    draft, found = load_model(job.draft, job.dtype, "cpu", threads=1), []
    for temperature, batch in sorted({(run.temperature, run.batch) for run in firsts}):
        answers = [
            answer
            for run in firsts
            if (run.temperature, run.batch) == (temperature, batch)
            for answer in run.answers
        ]
        guessed = replay_draft(
            draft, answers, SamplingParams(temperature=temperature, seed=answered.seed)
        )
        place = positions(guessed.ranks, guessed.scores)
        found.append(
            Acceptance(temperature=temperature, batch=batch, ranks=guessed.rates(), positions=place)
        )
    return tuple(found)


def memory_bandwidth() -> float:
    """Return the bytes per second that one core reads sequentially from memory."""
    import torch

    numbers = torch.ones(BANDWIDTH_NUMBERS)
    seconds = []
    for _ in range(REPEATS):
        began = time.monotonic()
        float(numbers.dot(numbers))
        seconds.append(time.monotonic() - began)
    return numbers.nbytes / statistics.median(seconds)
