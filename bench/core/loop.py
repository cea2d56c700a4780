"""The order and execution of the runs: interleaved, so that noise of the machine affects all
methods alike."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bench.core.compare import fastest_method
from bench.core.methods import Method, Outcome, Runner
from bench.core.prompts import Prompt
from bench.core.results import Results, Run
from runtime.core.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Case:
    """The work of every method in a round: these prompts as one batch, with this sampling."""

    name: str
    prompts: tuple[Prompt, ...]
    sampling: SamplingParams
    repetition: int = 0


@dataclass(frozen=True, slots=True)
class Round:
    """A case and the methods that run it, in this order."""

    case: Case
    methods: tuple[Method, ...]


def cases(
    prompts: Sequence[Prompt],
    batch: int,
    temperatures: Sequence[float],
    repetitions: int,
    new_tokens: int,
    seed: int,
) -> list[Case]:
    """Build cases: prompts in groups of `batch`, at each temperature, `repetitions` times.

    An incomplete last group is dropped. Every repetition samples with another seed; all methods of
    a repetition use the same one.
    """
    groups = [
        tuple(prompts[start : start + batch]) for start in range(0, len(prompts) - batch + 1, batch)
    ]
    return [
        Case(
            group_name(group),
            group,
            SamplingParams(temperature=temperature, seed=seed + repetition, max_tokens=new_tokens),
            repetition,
        )
        for repetition in range(repetitions)
        for group in groups
        for temperature in temperatures
    ]


def group_name(group: Sequence[Prompt]) -> str:
    return group[0].name if len(group) == 1 else f"{group[0].name} and {len(group) - 1} more"


def rounds(cases: Sequence[Case], methods: Sequence[Method]) -> list[Round]:
    """Combine each case with all methods; the order rotates by one from case to case."""
    found = []
    for number, case in enumerate(cases):
        shift = number % max(1, len(methods))
        found.append(Round(case, (*methods[shift:], *methods[:shift])))
    return found


def run_of(method: Method, case: Case, outcome: Outcome) -> Run:
    return Run(
        method=method.name,
        temperature=case.sampling.temperature,
        batch=len(case.prompts),
        prompt=case.name,
        repetition=case.repetition,
        tokens=sum(map(len, outcome.outputs)),
        seconds=outcome.seconds,
        first_tokens=outcome.first_tokens,
        first_seconds=outcome.first_seconds,
        text=digest(outcome),
        answers=tuple(
            (prompt.tokens, output)
            for prompt, output in zip(case.prompts, outcome.outputs, strict=True)
        ),
        steps=outcome.steps,
        passes=outcome.passes,
    )


def digest(outcome: Outcome) -> str:
    """Return a hash of the output tokens; equal outputs have equal hashes."""
    found = hashlib.sha256()
    for output in outcome.outputs:
        found.update(np.asarray([len(output), *output], dtype=np.int64).tobytes())
    return found.hexdigest()[:16]


def measure(
    plan: Sequence[Round], runner: Runner, progress: Progress, note: str
) -> Iterator[tuple[Run, ...]]:
    """Run the rounds in order and yield the runs of each round once all methods have finished it.

    The progress bar shows the running method and the time left.
    """
    task = progress.add_task(note, total=sum(len(round_.methods) for round_ in plan))
    for round_ in plan:
        found = []
        for method in round_.methods:
            progress.update(task, description=f"{note}: {method.name}")
            found.append(
                run_of(
                    method,
                    round_.case,
                    runner.run(method, round_.case.prompts, round_.case.sampling),
                )
            )
            progress.advance(task)
        yield tuple(found)
    progress.update(task, description=note)


def collect(
    results: Results, runs: Iterator[tuple[Run, ...]], keep: Callable[[Results], None]
) -> Results:
    """Return `results` with the runs added.

    `keep` gets the results after each round, so an interruption loses at most one round.
    """
    for found in runs:
        results = results.model_copy(update={"runs": (*results.runs, *found)})
        keep(results)
    return results


def best_settings(results: Results, candidates: Mapping[str, Sequence[Method]]) -> list[Method]:
    """Return the fastest measured candidate of each group, under the group's name.

    Candidates are compared at the lowest measured temperature.
    """
    found = []
    for name, methods in candidates.items():
        best = fastest_method(
            results,
            [method.name for method in methods],
            min((run.temperature for run in results.runs), default=0.0),
        )
        found += [Method(name, method.how) for method in methods if method.name == best]
    return found


def progress_bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(
        *columns, speed_estimate_period=600, refresh_per_second=1
    )  # frequent redraws would disturb the measurement
