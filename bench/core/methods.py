"""The compared methods, as data: ways to decode, ours and those of transformers, with their
cores."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from bench.core.prompts import Prompt
from bench.core.results import MethodFacts, Passes, Steps
from runtime.core.messages import Tokens
from runtime.core.sampling_params import SamplingParams

Cores = tuple[int, ...]  # indices into the list of the benchmark's cores
FIRST, SECOND, BOTH = (0,), (1,), (0, 1)
DRAFT = "draft"  # the pair's own drafter: a draft model, or a method trained for the target


@dataclass(frozen=True, slots=True)
class OutriderMethod:
    """A schedule of this runtime.

    schedule  a file in runtime/schedulers
    options   its settings, by name
    drafters  DRAFT, or drafting methods (files in runtime/drafters); "wrong" is the draft model
              with every guess replaced by a wrong one
    heads     files in runtime/heads
    cold      each run starts with nothing learned, as the first run of a process does
    """

    schedule: str
    options: tuple[tuple[str, int | float], ...] = ()
    drafters: tuple[str, ...] = ()
    target_cores: Cores = FIRST
    drafter_cores: Cores = SECOND
    heads: tuple[str, ...] = ()
    cold: bool = False

    @property
    def cores(self) -> Cores:
        return tuple(sorted({*self.target_cores, *(self.drafter_cores if self.drafters else ())}))


@dataclass(frozen=True, slots=True)
class TransformersMethod:
    """A call of transformers' generate.

    `guesses` is the constant number of tokens that the assistant guesses; 0 keeps its default
    schedule.
    """

    kind: Literal["greedy", "assisted", "lookup"]
    guesses: int = 0
    cores: Cores = FIRST


@dataclass(frozen=True, slots=True)
class LlamaCppMethod:
    """Decoding by llama.cpp; `guesses` is the number of tokens that prompt lookup guesses, or 0."""

    guesses: int = 0
    cores: Cores = FIRST


MethodSpec = OutriderMethod | TransformersMethod | LlamaCppMethod


@dataclass(frozen=True, slots=True)
class Method:
    """A named way to decode.

    `name` is unique within a benchmark and stable across benchmarks, since bench/reports/goals.py
    compares by name.
    """

    name: str
    how: MethodSpec

    @property
    def facts(self) -> MethodFacts:
        match self.how:
            case OutriderMethod(schedule, options, drafters, heads=heads, cold=cold):
                settings = [f"{name} {value:g}" for name, value in options]
                settings += ["nothing learned before"] if cold else []
                helpers = f"drafters: {' and '.join(drafters)}" if drafters else "no drafter"
                detail = ", ".join(
                    [schedule, *settings, helpers, *(f"head: {head}" for head in heads)]
                )
                return MethodFacts(
                    name=self.name, who="ours", cores=len(self.how.cores), detail=detail
                )
            case TransformersMethod(kind, guesses):
                detail = {
                    "greedy": "generate()",
                    "assisted": "generate(assistant_model=...), "
                    + (f"{guesses} guesses, constant" if guesses else "default schedule"),
                    "lookup": f"generate(prompt_lookup_num_tokens={guesses})",
                }[kind]
                return MethodFacts(
                    name=self.name, who="transformers", cores=len(self.how.cores), detail=detail
                )
            case LlamaCppMethod(guesses):
                detail = f"prompt lookup, {guesses} guesses" if guesses else "plain decoding"
                return MethodFacts(
                    name=self.name, who="llama.cpp", cores=len(self.how.cores), detail=detail
                )


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one run; times in seconds from the call on.

    outputs        the tokens of each prompt, including an end-of-text token
    seconds        total time
    first_seconds  time until every prompt had its first token
    first_tokens   tokens of all prompts that had been produced by then
    """

    outputs: tuple[Tokens, ...]
    seconds: float
    first_seconds: float
    first_tokens: int
    steps: Steps | None = None
    passes: Passes | None = None


class Runner(Protocol):
    def run(self, method: Method, prompts: Sequence[Prompt], sampling: SamplingParams) -> Outcome:
        """Continue all prompts as one batch, alone on the machine.

        Raises OutriderError if the method does not support the request.
        """
        ...


def cores_suffix(cores: Cores) -> str:
    return "" if len(cores) == 1 else f", {len(cores)} cores"


PLAIN = Method("plain", OutriderMethod("plain"))
LIVING = Method("living", OutriderMethod("living", drafters=(DRAFT,)))
GREEDY = Method("transformers greedy", TransformersMethod("greedy"))
PLAIN_METHODS = (
    PLAIN,
    Method("plain, 2 cores", OutriderMethod("plain", target_cores=BOTH)),
)
LIVING_METHODS = (
    LIVING,
    Method("living + ngram", OutriderMethod("living", drafters=(DRAFT, "ngram"))),
    Method("living, cold", OutriderMethod("living", drafters=(DRAFT,), cold=True)),
    Method("living, no drafter", OutriderMethod("living")),
    Method("living, wrong drafter", OutriderMethod("living", drafters=("wrong",))),
)
AMUSD = Method("amusd", OutriderMethod("amusd", drafters=(DRAFT,)))
TRANSFORMERS_KINDS = {
    "transformers greedy": TransformersMethod("greedy"),
    "assisted": TransformersMethod("assisted"),
    "assisted 3": TransformersMethod("assisted", 3),
    "assisted 5": TransformersMethod("assisted", 5),
    "assisted 8": TransformersMethod("assisted", 8),
    "prompt lookup": TransformersMethod("lookup", 10),
}
TRANSFORMERS_METHODS = tuple(
    Method(name + cores_suffix(cores), replace(how, cores=cores))
    for cores in (FIRST, BOTH)
    for name, how in TRANSFORMERS_KINDS.items()
)
LLAMA_CPP_METHODS = tuple(
    Method(name + cores_suffix(cores), LlamaCppMethod(guesses, cores))
    for cores in (FIRST, BOTH)
    for name, guesses in (
        ("llama.cpp", 0),
        ("llama.cpp lookup 2", 2),
        ("llama.cpp lookup 10", 10),
    )
)
# Methods that are measured in batches.
BATCHED = (PLAIN, LIVING, GREEDY)

UNKNOWN_GAMMA = 8  # of PEARL; half and a quarter of it are tried too
CHAINS = tuple(
    OutriderMethod("sync", (("width", 1), ("branches", 1), ("passes", k), ("rows", k)), (DRAFT,))
    for k in (2, 3, 4, 5, 6, 8, 12)
)
TREES = tuple(
    OutriderMethod(
        "sync",
        (("width", width), ("branches", branches), ("passes", passes), ("rows", rows)),
        (DRAFT,),
    )
    for width, branches, passes, rows in (
        (2, 2, 4, 8),
        (4, 2, 4, 12),
        (4, 4, 4, 15),
        (4, 2, 6, 15),
        (4, 4, 8, 24),
        (8, 4, 4, 31),
        (8, 4, 6, 31),
    )
)


def sweep_candidates(gamma: int | None) -> dict[str, tuple[Method, ...]]:
    """Return the methods whose settings are swept, by name, each with all candidate settings.

    The best candidate then takes over the name. `gamma` is the value that PEARL's authors recommend
    for this pair; None if the time of a draft pass is not known before the runs. A drafter that
    waits while the target works on both cores may use both cores too, or the second alone.
    """
    both = [
        replace(how, target_cores=BOTH, drafter_cores=cores)
        for how in TREES
        for cores in (SECOND, BOTH)
    ]
    gammas = sorted({max(1, (gamma or UNKNOWN_GAMMA) // part) for part in (1, 2, 4)})
    pearl = tuple(OutriderMethod("pearl", (("passes", k),), (DRAFT,)) for k in gammas)
    groups = {
        "sync chain": CHAINS,
        "sync tree": TREES,
        "sync tree, 2 cores": tuple(both),
        "pearl": pearl,
    }
    return {
        name: tuple(Method(f"{name} #{number}", how) for number, how in enumerate(hows))
        for name, hows in groups.items()
    }
