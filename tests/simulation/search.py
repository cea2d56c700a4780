"""Searches seeds for a broken promise, and shrinks the scenario of one that fails."""

import logging
import multiprocessing
import os
import re
import shlex
from collections.abc import Callable, Iterator
from itertools import repeat
from multiprocessing.sharedctypes import Synchronized

from tests.simulation.planted import planted
from tests.simulation.scenario import Scenario, draw
from tests.simulation.simulation import Result, run

SHRINK_RUNS = 150
CHUNK_SEEDS = 8


def simulate(seed: int, left_out: frozenset[str] = frozenset(), plant: str = "") -> Result:
    """Simulate a seed, with a planted fault if `plant` names one."""
    with planted(plant):
        return run(draw(seed, left_out))


def failure_of(work: tuple[int, str]) -> tuple[int, str]:
    """Return the seed and its failure, "" if it has none."""
    seed, plant = work
    return seed, simulate(seed, plant=plant).failure


def failures(seeds: range, jobs: int, plant: str = "") -> Iterator[tuple[int, str]]:
    """Yield each seed, as it is done, with its failure. Uses so many processes."""
    work = zip(seeds, repeat(plant))
    if jobs == 1:
        stay_on_core(0)
        yield from map(failure_of, work)
        return
    context = multiprocessing.get_context("fork")
    cores = context.Value("i", 0)
    with context.Pool(jobs, start_worker, (cores,)) as pool:
        yield from pool.imap_unordered(failure_of, work, CHUNK_SEEDS)


def start_worker(started: "Synchronized[int]") -> None:
    logging.disable(logging.CRITICAL)
    with started.get_lock():
        number = started.value
        started.value += 1
    stay_on_core(number)


def stay_on_core(number: int) -> None:
    """Threads of one simulation hand over faster on one core."""
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[number % len(allowed)]})


def shrink(seed: int, plant: str = "", tell: Callable[[str], object] = lambda _: None) -> Scenario:
    """Return the scenario of a failing seed without the parts that its failure does not need."""
    left_out, runs, wanted = frozenset[str](), 0, kind(simulate(seed, plant=plant).failure)
    size = max(1, len(draw(seed).parts) // 2)
    while True:
        parts = draw(seed, left_out).parts
        removed = False
        for start in range(0, len(parts), size):
            some = frozenset(parts[start : start + size])
            if runs < SHRINK_RUNS:
                failure = simulate(seed, left_out | some, plant).failure
                if failure and kind(failure) == wanted:
                    left_out, removed = left_out | some, True
            runs += 1
        tell(f"shrinking: {len(draw(seed, left_out).parts)} parts left after {runs} runs")
        if runs >= SHRINK_RUNS or (size == 1 and not removed):
            return draw(seed, left_out)
        size = max(1, size // 2)


def kind(failure: str) -> str:
    """Return a failure without the numbers and lists in it."""
    return re.sub(r"\[.*\]|\d+", "", failure)


def command(scenario: Scenario, plant: str = "") -> str:
    """Return the command that replays a scenario."""
    words = [f"python -m tests.simulation --seed {scenario.seed}"]
    if scenario.left_out:
        words.append(f"--without {','.join(sorted(scenario.left_out))}")
    if plant:
        words.append(f"--plant {shlex.quote(plant)}")
    return " ".join(words)
