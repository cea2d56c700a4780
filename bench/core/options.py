"""What a benchmark is to do, checked; how large it is by default; how long it will take."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.core.loop import Case, Round, cases, rounds
from bench.core.machine import BF16_FLAGS
from bench.core.methods import (
    AMUSD,
    BATCHED,
    BOTH,
    GREEDY,
    LIVING,
    LIVING_METHODS,
    PLAIN,
    PLAIN_METHODS,
    TRANSFORMERS_METHODS,
    Method,
    OutriderMethod,
    sweep_candidates,
)
from bench.core.prompts import Prompt
from bench.core.widen import CACHE
from runtime.core.errors import InvalidRequest
from runtime.core.sampling_params import SamplingParams, check_int
from runtime.model_paths import bundled_model

RESULTS = Path(__file__).parents[1] / "results"
# Prompts for the sweep, for warming up, and for those methods that learn what guesses are worth: a target keeps that from one life to
# the next, here it begins with nothing. None of them is measured.
SWEEP_PROMPTS, WARM_UP_PROMPTS, LEARNING_PROMPTS = 2, 2, 4
DtypeChoice = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Size:
    count: int
    repetitions: int  # of our own methods at the lowest temperature; once otherwise
    new_tokens: int
    temperatures: tuple[float, ...]
    batches: tuple[int, ...]


FULL = Size(count=5, repetitions=2, new_tokens=128, temperatures=(0.0, 0.8), batches=(4, 8, 16))
QUICK = Size(count=2, repetitions=1, new_tokens=32, temperatures=(0.0,), batches=(4,))


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """`prompts`: a file or folder, None for held-out files. `folder`: for the results and the page, both called `name`."""

    target: str
    draft: str
    widen: bool
    dtype: Literal["float32", "bfloat16"]
    prompts: Path | None
    size: Size
    seed: int
    quick: bool
    folder: Path
    name: str


def choose_dtype(wanted: DtypeChoice, flags: Iterable[str]) -> Literal["float32", "bfloat16"]:
    """bf16 where the processor multiplies it. Elsewhere rows cost too much: on AVX-512 without it 16 of them took 7 times as long as
    one, in float32 1.4 times."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if BF16_FLAGS & set(flags) else "float32"


def validated(size: Size) -> Size:
    """Raises InvalidRequest. Temperatures and batches in rising order, none twice; a batch of one is the main run itself."""
    check_int("count", size.count, 1)
    check_int("repetitions", size.repetitions, 1, 100)
    check_int("new_tokens", size.new_tokens, 2)
    if not size.temperatures:
        raise InvalidRequest("no temperature is given: give at least one", "temperature")
    for temperature in size.temperatures:
        SamplingParams(temperature=temperature)
    for batch in size.batches:
        check_int("batch", batch, 1, 256)
    rising = tuple(sorted(set(size.temperatures)))
    return Size(
        size.count,
        size.repetitions,
        size.new_tokens,
        rising,
        tuple(sorted(set(size.batches) - {1})),
    )


def shipped_pair() -> tuple[str, str]:
    return bundled_model("target"), bundled_model("draft")


def folder_for(quick: bool) -> Path:
    """Results of a quick run are not for keeping."""
    return CACHE / "results" if quick else RESULTS


@dataclass(frozen=True, slots=True)
class Suite:
    """The methods of a benchmark; `groups` by name, in all settings that the sweep tries; `batched` those that take several prompts."""

    fixed: tuple[Method, ...]
    groups: Mapping[str, tuple[Method, ...]]
    rivals: tuple[Method, ...]
    batched: tuple[Method, ...] = BATCHED

    @property
    def all(self) -> tuple[Method, ...]:
        return (
            *self.fixed,
            *(method for group in self.groups.values() for method in group),
            *self.rivals,
        )

    def final(self, best: Sequence[Method]) -> tuple[Method, ...]:
        """With the best settings in place of the groups."""
        return (*self.fixed, *best, *self.rivals)


def choose_suite(quick: bool, gamma: int) -> Suite:
    """`gamma`: PEARL's, for this pair."""
    groups = sweep_candidates(gamma)
    if not quick:
        return Suite((*PLAIN_METHODS, *LIVING_METHODS, AMUSD), groups, TRANSFORMERS_METHODS)
    rivals = tuple(
        method for method in TRANSFORMERS_METHODS if method.name in (GREEDY.name, "assisted 5")
    )
    return Suite((PLAIN, LIVING), {"sync tree": groups["sync tree"][1:3]}, rivals)


def main_rounds(
    prompts: Sequence[Prompt], size: Size, seed: int, methods: Sequence[Method]
) -> list[Round]:
    """All methods once; then again, at the lowest temperature, those of ours."""
    every = cases(prompts, 1, size.temperatures, size.repetitions, size.new_tokens, seed)
    again = [
        case
        for case in every
        if case.repetition > 0 and case.sampling.temperature == min(size.temperatures)
    ]
    return [
        *rounds([case for case in every if case.repetition == 0], methods),
        *rounds(again, own_methods(methods)),
    ]


def own_methods(methods: Sequence[Method]) -> list[Method]:
    return [method for method in methods if isinstance(method.how, OutriderMethod)]


def batch_cases(prompts: Sequence[Prompt], size: Size, seed: int) -> list[Case]:
    """One group of each size, greedy; sizes beyond the number of prompts are left out."""
    return [
        case
        for batch in size.batches
        for case in cases(prompts[:batch], batch, (0.0,), 1, size.new_tokens, seed)
        if batch <= len(prompts)
    ]


# Seconds of a token in steps of one row on one core, as they were found on two machines; for the time left to wait, and nothing else.
RELATIVE_COSTS = {"plain": 1.0, "greedy": 1.4, "lookup": 1.1, "assisted": 0.9}
COST_WITH_DRAFTS, COST_WITHOUT_DRAFTS, TWO_CORE_FACTOR = (
    0.5,
    1.1,
    0.7,
)  # with drafts; with none, or wrong ones; on two cores, of that on one


def relative_cost(method: Method) -> float:
    how = method.how
    if isinstance(how, OutriderMethod):
        found = (
            RELATIVE_COSTS["plain"]
            if how.schedule == "plain"
            else COST_WITH_DRAFTS
            if set(how.drafters) & {"model", "ngram"}
            else COST_WITHOUT_DRAFTS
        )
        return found * (TWO_CORE_FACTOR if how.target_cores == BOTH else 1.0)
    return RELATIVE_COSTS[how.kind] * (TWO_CORE_FACTOR if how.cores == BOTH else 1.0)


def expected_seconds(which: Suite, size: Size, step: float) -> float:
    """Of everything after the profile, where a step of one row takes `step` seconds. A prompt is read in about ten steps."""
    methods, one = (
        which.final([group[0] for group in which.groups.values()]),
        (size.new_tokens + 10) * step,
    )
    again = size.count * (size.repetitions - 1) + WARM_UP_PROMPTS * len(size.temperatures)
    main = (
        size.count * len(size.temperatures) * sum(map(relative_cost, methods)) * one
        + again * sum(map(relative_cost, own_methods(methods))) * one
    )
    learning = (
        LEARNING_PROMPTS * len(size.temperatures) * sum(map(relative_cost, LIVING_METHODS)) * one
    )
    sweep = (
        SWEEP_PROMPTS
        * sum(relative_cost(method) for group in which.groups.values() for method in group)
        * one
    )
    batched = (
        sum((size.new_tokens * (1 + batch / 16) + 10 * batch) * step for batch in size.batches)
        * 1.5
        * len(which.batched)
    )
    return 60.0 + main + learning + sweep + batched
