"""The options of a benchmark: validation, default sizes, and the expected duration."""

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
    DRAFT,
    GREEDY,
    LIVING,
    LIVING_METHODS,
    LLAMA_CPP_METHODS,
    PLAIN,
    PLAIN_METHODS,
    TRANSFORMERS_METHODS,
    Method,
    OutriderMethod,
    TransformersMethod,
    sweep_candidates,
)
from bench.core.prompts import Prompt
from bench.core.widen import CACHE
from runtime.core.errors import InvalidRequest
from runtime.core.sampling_params import SamplingParams, check_int
from runtime.model_paths import bundled_model

RESULTS = Path(__file__).parents[1] / "results"
# Prompts for the sweep, for the warm-up, and for the methods that calibrate their guesses. A served
# target keeps its calibration across restarts; here it starts empty. None of these is measured.
SWEEP_PROMPTS, WARM_UP_PROMPTS, LEARNING_PROMPTS = 2, 2, 4
DtypeChoice = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Size:
    count: int
    repetitions: int  # runs of our methods at the lowest temperature; all others run once
    new_tokens: int
    temperatures: tuple[float, ...]
    batches: tuple[int, ...]


FULL = Size(count=5, repetitions=2, new_tokens=128, temperatures=(0.0, 0.8), batches=(4, 8, 16))
QUICK = Size(count=2, repetitions=1, new_tokens=32, temperatures=(0.0,), batches=(4,))


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """The validated options of a benchmark.

    `draft` is what `method` reads: a draft model, or what was trained for the target. `gguf` is the
    file of the same target for llama.cpp, or None to leave it out.
    `prompts` is a file or folder, or None for held-out files. The results and the page are written
    to `folder` under the name `name`.
    """

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
    method: str = "model"
    gguf: Path | None = None


def choose_dtype(wanted: DtypeChoice, flags: Iterable[str]) -> Literal["float32", "bfloat16"]:
    """Choose bfloat16 if the processor multiplies it natively, else float32.

    Without native support rows cost too much: on AVX-512 16 rows took 7 times as long as one, in
    float32 1.4 times.
    """
    if wanted != "auto":
        return wanted
    return "bfloat16" if BF16_FLAGS & set(flags) else "float32"


def validated(size: Size) -> Size:
    """Return the size with temperatures and batches sorted and deduplicated; a batch of 1 is
    dropped.

    A batch of 1 is the main run. Raises InvalidRequest for values out of range.
    """
    check_int("count", size.count, 1)
    check_int("repetitions", size.repetitions, 1, 100)
    check_int("new_tokens", size.new_tokens, 2)
    if not size.temperatures:
        raise InvalidRequest("no temperature given: give at least one", "temperature")
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
    """Return the default output folder; results of a quick run go to the cache."""
    return CACHE / "results" if quick else RESULTS


@dataclass(frozen=True, slots=True)
class Suite:
    """The methods of a benchmark.

    fixed    methods without settings to sweep
    groups   methods by name, each with all settings that the sweep tries
    rivals   methods of transformers
    batched  methods that are also measured with several prompts at a time
    """

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
        """Return the methods with each group replaced by its best setting."""
        return (*self.fixed, *best, *self.rivals)


def choose_suite(
    quick: bool, gamma: int | None, has_model: bool = True, llama_cpp: bool = False
) -> Suite:
    """Return the methods to measure.

    gamma      PEARL's parameter for this pair; None if it is not known
    has_model  the drafter is a draft model, which transformers' assisted generation needs too
    llama_cpp  llama.cpp takes part
    """
    groups = sweep_candidates(gamma)
    rivals = (*TRANSFORMERS_METHODS, *(LLAMA_CPP_METHODS if llama_cpp else ()))
    if not has_model:
        rivals = tuple(method for method in rivals if not needs_model(method))
    if not quick:
        fixed = (*PLAIN_METHODS, *LIVING_METHODS, AMUSD)
        return Suite(
            tuple(method for method in fixed if has_model or not needs_model(method)),
            groups,
            rivals,
        )
    few = (GREEDY.name, "assisted 5", LLAMA_CPP_METHODS[0].name)
    return Suite(
        (PLAIN, LIVING),
        {"sync tree": groups["sync tree"][1:3]},
        tuple(method for method in rivals if method.name in few),
    )


def needs_model(method: Method) -> bool:
    """Return whether the method needs a draft model."""
    match method.how:
        case OutriderMethod(drafters=drafters):
            return "wrong" in drafters
        case TransformersMethod(kind=kind):
            return kind == "assisted"
        case _:
            return False


def main_rounds(
    prompts: Sequence[Prompt], size: Size, seed: int, methods: Sequence[Method]
) -> list[Round]:
    """Run every method once, then repeat our own methods at the lowest temperature."""
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
    """Return one greedy case per batch size; sizes beyond the number of prompts are dropped."""
    return [
        case
        for batch in size.batches
        for case in cases(prompts[:batch], batch, (0.0,), 1, size.new_tokens, seed)
        if batch <= len(prompts)
    ]


# Time of a token in units of a one-row step on one core, as measured on two machines. Used only to
# estimate the duration.
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
            if set(how.drafters) & {DRAFT, "ngram"}
            else COST_WITHOUT_DRAFTS
        )
        return found * (TWO_CORE_FACTOR if how.target_cores == BOTH else 1.0)
    kind = how.kind if isinstance(how, TransformersMethod) else "plain"
    return RELATIVE_COSTS[kind] * (TWO_CORE_FACTOR if how.cores == BOTH else 1.0)


def expected_seconds(which: Suite, size: Size, step: float) -> float:
    """Estimate the time of everything after the profile, if a step of one row takes `step` seconds.

    Reading a prompt takes about ten steps.
    """
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
