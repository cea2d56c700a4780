"""The pair by itself: T(n), t(w) and acceptance, one model after the other on one core."""

import os
import statistics
import time
from dataclasses import dataclass

from bench.prompts import Prompt
from bench.results import Acceptance, Profile
from runtime.sampling import Sampling

TARGET_ROWS = (1, 2, 4, 8, 16, 32, 64)
DRAFT_ROWS = (1, 2, 4, 8, 16, 32)
TEXTS = 8
REPEATS = 7
STREAM = 1 << 26  # float32 numbers read at once to find the memory's bandwidth: more than any cache holds


@dataclass(frozen=True, slots=True)
class Job:
    """`samplings`: one for each temperature."""

    target: str
    draft: str
    dtype: str
    core: int
    prompts: tuple[Prompt, ...]
    samplings: tuple[Sampling, ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """`parameters` of target and draft."""

    profile: Profile
    parameters: tuple[int, int]


def measure(job: Job) -> Measured:
    """Stays on its core from then on: to be called in a process of its own (bench/apart.py)."""
    os.sched_setaffinity(0, (job.core,))
    from actors.compose import end_tokens
    from runtime.models.acceptance import replay
    from runtime.models.load import load_model, load_tokenizer
    from runtime.models.timing import step_times, text_time
    from runtime.sim.measured import positions

    target, draft = (load_model(name, job.dtype, "cpu", threads=1) for name in (job.target, job.draft))
    eos = end_tokens(target, load_tokenizer(job.target))
    texts = [prompt.tokens for prompt in job.prompts]
    size = sum(weight.nbytes for weight in target.module.parameters())
    profile = Profile(
        target=step_times(target, TARGET_ROWS, time.monotonic, REPEATS),
        draft=step_times(draft, DRAFT_ROWS, time.monotonic, REPEATS),
        acceptance=tuple(
            Acceptance(temperature=sampling.temperature, ranks=found.rates(), positions=positions(found.ranks, found.scores))
            for sampling in job.samplings
            for found in [replay(target, draft, texts, sampling, eos)]
        ),
        floor=size / bandwidth(),
        text=text_time(target, TEXTS, time.monotonic, REPEATS),
    )
    return Measured(profile, (target.module.num_parameters(), draft.module.num_parameters()))


def bandwidth() -> float:
    """Bytes per second that one core reads from memory, in order."""
    import torch

    numbers = torch.ones(STREAM)
    seconds = []
    for _ in range(REPEATS):
        began = time.monotonic()
        float(numbers.dot(numbers))
        seconds.append(time.monotonic() - began)
    return numbers.nbytes / statistics.median(seconds)
