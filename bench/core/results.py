"""What a benchmark found, as it is kept in bench/results/NAME.json. Times are in seconds."""

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from runtime.config import StrictModel
from runtime.core.errors import InvalidRequest
from runtime.core.messages import Stats, Tokens
from runtime.sim.pair_profile import Position


class Machine(StrictModel):
    """`cores` are those that the benchmark used; `flags` those of the processor that decide how fast bf16 is."""

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
    """Names, parameters and data type of the two models."""

    target: str
    draft: str
    target_parameters: int
    draft_parameters: int
    dtype: str


class RunSettings(StrictModel):
    prompts: str  # where they are from
    count: int
    new_tokens: int
    repetitions: int
    seed: int


class MethodFacts(StrictModel):
    name: str
    who: Literal["ours", "transformers"]
    cores: int
    detail: str


class Steps(StrictModel):
    """Of the target's steps in one run of ours. `lead` is the mean number of tokens by which drafting was ahead when a step began."""

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
    """What one run of ours recorded of its costs.

    target       rows, sessions and seconds of each pass of the target
    bookkeeping  seconds from each to the next, without waits and the reading of prompts, all together
    messages     of growth that the target took in
    drafting     leaves of each pass of a drafter, and seconds until its next one began
    round_trip   from target to drafter and back; None without a drafter
    """

    target: tuple[tuple[int, int, float], ...]
    bookkeeping: float
    messages: int
    drafting: tuple[tuple[int, float], ...] = ()
    round_trip: float | None = None


class Run(StrictModel):
    """One run of one method. `prompt` names the prompt, or where `batch` is above 1 the group of them; `text` is a digest of the output.

    `first_seconds` and `first_tokens` end with the first token of every prompt: what is left of the run is decoding. `answers`: each
    prompt and its output; the file of results does not keep them, nor the passes.
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
    """Along plain decoding's texts of one temperature and batch. By number k of guesses: the share of positions at which the draft's
    first k hold the target's choice; and position by position."""

    temperature: float
    batch: int = 1
    ranks: dict[int, float]
    positions: tuple[Position, ...] = ()


class InPlace(StrictModel):
    """What passes and bookkeeping cost where they ran, of all runs of one temperature and batch.

    `target` is T(n) of one text, a drafter at work beside it. `round_trip` is from target to drafter and back; `step` the target's
    bookkeeping for each session of a pass, `message` more of it for each growth taken in, `draft_pass` a drafter's between two passes.
    """

    temperature: float
    batch: int = 1
    target: dict[int, float]
    step: float
    message: float | None = None
    round_trip: float | None = None
    draft_pass: float | None = None


class Profile(StrictModel):
    """The pair on one core each (or on the GPU): medians of three times, before, between and after the runs. Step times by rows, the
    root included.

    `floor` is the time that the memory alone needs for a step with one row: bytes of weights over the measured bandwidth.
    `text` is what each further text adds to a pass of the target.
    """

    target: dict[int, float] = Field(default_factory=dict)
    draft: dict[int, float] = Field(default_factory=dict)
    acceptance: tuple[Acceptance, ...] = ()
    places: tuple[InPlace, ...] = ()
    floor: float | None = None
    text: float | None = None


class SweepResult(StrictModel):
    """A setting that the sweep tried, on prompts that were not measured later; `name` is the method's if it was the best."""

    name: str
    detail: str
    tokens_per_second: float


class Forecast(StrictModel):
    """What the planner expects of a method, decoding alone, all prompts of the batch together."""

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
    """Replaces the file at once: who reads or interrupts sees the old content or the new."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(results.model_dump_json(indent=1) + "\n", "utf-8")
    partial.replace(file)


def read_results(file: Path) -> Results:
    try:
        return Results.model_validate_json(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"{file} cannot be read: give a file that the benchmark wrote", "results"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(
            f"{file} holds no results ({where or 'content'}: {first['msg']}): run the benchmark again",
            "results",
        ) from error
