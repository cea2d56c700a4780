"""The results of a benchmark, as stored in bench/results/NAME.json. Times are in seconds."""

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from runtime.config import StrictModel
from runtime.core.errors import InvalidRequest
from runtime.core.messages import Stats, Tokens
from runtime.sim.pair_profile import Position


class Machine(StrictModel):
    """The machine of a benchmark.

    `cores` counts the cores used; `flags` are the CPU flags that determine the speed of bf16.
    """

    processor: str
    flags: tuple[str, ...]
    cores: int
    memory_gib: float
    gpu: str = ""
    python: str
    torch: str
    transformers: str
    date: str


class PairFacts(StrictModel):
    """Names, parameter counts and data type of the two models.

    `method` is the drafting method. A draft that is no model of its own has 0 parameters.
    """

    target: str
    draft: str
    target_parameters: int
    draft_parameters: int
    dtype: str
    method: str = "model"


class RunSettings(StrictModel):
    prompts: str  # their source
    count: int
    new_tokens: int
    repetitions: int
    seed: int


class MethodFacts(StrictModel):
    name: str
    who: Literal["ours", "transformers", "llama.cpp"]
    cores: int
    detail: str


class Steps(StrictModel):
    """The target's steps in one run of ours.

    `lead` is the mean number of tokens by which drafting was ahead when a step began.
    """

    rounds: int
    drafted: int
    verified: int
    accepted: int
    hits: int
    computed: float
    waited: float
    bookkeeping: float
    by_drafter: dict[str, int] = Field(default_factory=dict)
    lead: float | None = None


class Passes(StrictModel):
    """The costs that one run of ours recorded.

    target       rows, sessions and seconds of each target pass
    bookkeeping  total seconds between passes, without waits and prefill
    messages     growth messages that the target received
    drafting     leaves of each drafter pass, and seconds until its next one began
    round_trip   seconds from target to drafter and back; None without a drafter
    """

    target: tuple[tuple[int, int, float], ...]
    bookkeeping: float
    messages: int
    drafting: tuple[tuple[int, float], ...] = ()
    round_trip: float | None = None


class Run(StrictModel):
    """One run of one method.

    prompt   name of the prompt, or of the group if `batch` is above 1
    text     a digest of the output
    answers  each prompt with its output; not stored
    passes   recorded costs; not stored

    `first_seconds` and `first_tokens` end with the first token of every prompt; the rest of the run
    is decoding.
    """

    method: str
    temperature: float
    batch: int
    prompt: str
    repetition: int
    tokens: int
    seconds: float
    first_tokens: int
    first_seconds: float
    text: str
    steps: Steps | None = None
    answers: tuple[tuple[Tokens, Tokens], ...] = Field(default=(), exclude=True, repr=False)
    passes: Passes | None = Field(default=None, exclude=True, repr=False)


class Acceptance(StrictModel):
    """The draft's acceptance on the texts of plain decoding at one temperature and batch.

    `ranks` maps k to the share of positions at which the first k guesses contain the target's
    choice; `positions` lists each position.
    """

    temperature: float
    batch: int = 1
    ranks: dict[int, float]
    positions: tuple[Position, ...] = ()


class InPlace(StrictModel):
    """Costs measured during all runs of one temperature and batch.

    target      T(n) of one text while a drafter is working
    step        the target's bookkeeping per session and pass
    message     additional bookkeeping per growth received
    round_trip  from target to drafter and back
    draft_pass  a drafter's time between two passes
    """

    temperature: float
    batch: int = 1
    target: dict[int, float]
    step: float
    message: float | None = None
    round_trip: float | None = None
    draft_pass: float | None = None


class Profile(StrictModel):
    """The pair on one core each (or on the GPU); step times by rows, including the root.

    Values are medians of three measurements: before, between and after the runs.

    floor  time of a one-row step if only memory limits it: bytes of weights over measured bandwidth
    text   what each further text adds to a target pass
    """

    target: dict[int, float] = Field(default_factory=dict)
    draft: dict[int, float] = Field(default_factory=dict)
    acceptance: tuple[Acceptance, ...] = ()
    places: tuple[InPlace, ...] = ()
    floor: float | None = None
    text: float | None = None


class SweepResult(StrictModel):
    """A setting that the sweep tried on prompts that are not measured later.

    `name` is the method's name if this setting wins.
    """

    name: str
    detail: str
    tokens_per_second: float


class Forecast(StrictModel):
    """The planner's expected decoding speed of a method, over all prompts of the batch."""

    method: str
    temperature: float
    batch: int
    tokens_per_second: float


class Results(StrictModel):
    format: Literal[1] = 1
    name: str
    machine: Machine
    pair: PairFacts
    settings: RunSettings
    methods: tuple[MethodFacts, ...]
    profile: Profile = Profile()
    sweep: tuple[SweepResult, ...] = ()
    runs: tuple[Run, ...] = ()
    forecasts: tuple[Forecast, ...] = ()


def steps_of(stats: Stats, lead: float | None = None) -> Steps:
    return Steps(
        rounds=stats.rounds,
        drafted=stats.drafted,
        verified=stats.verified,
        accepted=stats.accepted,
        hits=stats.hits,
        computed=stats.computed,
        waited=stats.waited,
        bookkeeping=stats.bookkeeping,
        by_drafter=stats.by_drafter,
        lead=lead,
    )


def write_results(results: Results, file: Path) -> None:
    """Replace the file atomically: a reader or an interruption sees the old content or the new."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(results.model_dump_json(indent=1) + "\n", "utf-8")
    partial.replace(file)


def read_results(file: Path) -> Results:
    try:
        return Results.model_validate_json(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"{file} cannot be read: give a results file of the benchmark", "results"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(
            f"{file} is not a results file ({where or 'content'}: {first['msg']}): run the "
            "benchmark again",
            "results",
        ) from error
