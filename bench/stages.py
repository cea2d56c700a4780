"""The stages of a benchmark.

Each stage takes what has been found so far and returns it with its own part added; `bench/run.py` does one after the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich.progress import Progress

from bench.core import compare, loop, profiling
from bench.core.forecasts import forecasts, foreseen
from bench.core.loop import Case, Round, cases, rounds
from bench.core.methods import LIVING, LIVINGS, PLAIN, Method, OutriderMethod, Runner
from bench.core.options import SWEPT, WARMING, Options, Suite, batch_cases, main_rounds, own
from bench.core.places import places
from bench.core.profiling import Answered, Job
from bench.core.prompts import Prompt
from bench.core.results import Profile, Results, Tried
from bench.core.subprocess_call import call_in_subprocess
from runtime.core.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, and on which prompts.

    pair     the job that profiles the pair by itself
    prompts  enough for the runs and for the largest batch
    asides   others for the sweep, for warming up and for learning
    """

    options: Options
    suite: Suite
    pair: Job
    prompts: Sequence[Prompt]
    asides: Sequence[Prompt]

    @property
    def measured(self) -> Sequence[Prompt]:
        return self.prompts[: self.options.size.count]

    @property
    def swept(self) -> Sequence[Prompt]:
        return self.asides[:SWEPT]

    @property
    def warming(self) -> Sequence[Prompt]:
        return self.asides[SWEPT : SWEPT + WARMING]

    @property
    def learned(self) -> Sequence[Prompt]:
        return self.asides[SWEPT + WARMING :]

    @property
    def lowest(self) -> float:
        return min(self.options.size.temperatures)

    @property
    def few(self) -> int:
        """New tokens of a text that only warms up."""
        return max(2, self.options.size.new_tokens // 4)

    def cases(
        self,
        prompts: Sequence[Prompt],
        temperatures: Sequence[float],
        new_tokens: int | None = None,
    ) -> list[Case]:
        """Each prompt by itself, once at each temperature."""
        return cases(
            prompts,
            1,
            temperatures,
            1,
            new_tokens or self.options.size.new_tokens,
            self.options.seed,
        )


@dataclass(frozen=True, slots=True)
class State:
    """What has been found. `methods` are known once the sweep has chosen the best setting of each."""

    results: Results
    methods: tuple[Method, ...] = ()
    profiles: tuple[Profile, ...] = ()

    def updated(self, **changes: object) -> "State":
        """With these fields of the results changed."""
        return replace(self, results=self.results.model_copy(update=changes))


@dataclass(frozen=True, slots=True)
class Lab:
    """What stages measure with. `keep` gets the results after each round; `profile` measures the pair by itself."""

    runner: Runner
    progress: Progress
    keep: Callable[[Results], None]
    profile: Callable[[], Profile]

    def discard(self, plan: Sequence[Round], note: str) -> None:
        """Do the rounds for their effect on caches and on what methods learn."""
        for _ in loop.measure(plan, self.runner, self.progress, note):
            pass

    def add(self, results: Results, plan: Sequence[Round], note: str) -> Results:
        """The results with the runs of these rounds, kept round by round."""
        return loop.collect(
            results, loop.measure(plan, self.runner, self.progress, note), self.keep
        )


Stage = Callable[[Plan, State, Lab], State]


def start_up(plan: Plan, state: State, lab: Lab) -> State:
    """Every runner has run before anything is measured."""
    first = [group[0] for group in plan.suite.groups.values()]
    methods = [*plan.suite.fixed, *first, *plan.suite.rivals]
    lab.discard(
        rounds(plan.cases(plan.warming[:1], (plan.lowest,), plan.few), methods), "warming up"
    )
    return state


def sweep(plan: Plan, state: State, lab: Lab) -> State:
    """Tries all settings on prompts that are not measured, and chooses the fastest of each method."""
    tried = tuple(method for group in plan.suite.groups.values() for method in group)
    without_keeping = replace(lab, keep=lambda results: None)
    found = without_keeping.add(
        state.results, rounds(plan.cases(plan.swept, (plan.lowest,)), tried), "sweep"
    )
    methods = plan.suite.final(loop.chosen(found, plan.suite.groups))
    settings = told(found, plan.suite, plan.lowest)
    return replace(state, methods=methods).updated(
        methods=tuple(method.facts for method in methods), sweep=settings
    )


def warm_up(plan: Plan, state: State, lab: Lab) -> State:
    temperatures = plan.options.size.temperatures
    lab.discard(rounds(plan.cases(plan.warming, temperatures), own(state.methods)), "warming up")
    return state


def learn(plan: Plan, state: State, lab: Lab) -> State:
    """The living methods learn what guesses are worth, as they do in a target that serves."""
    lab.discard(
        rounds(plan.cases(plan.learned, plan.options.size.temperatures), LIVINGS), "learning"
    )
    return state


def run_all(plan: Plan, state: State, lab: Lab) -> State:
    todo = main_rounds(plan.measured, plan.options.size, plan.options.seed, state.methods)
    return replace(state, results=lab.add(state.results, todo, "runs"))


def profile(plan: Plan, state: State, lab: Lab) -> State:
    """Measures the pair by itself again: the profile speaks of the machine as the runs met it."""
    return replace(state, profiles=(*state.profiles, lab.profile()))


def batches(plan: Plan, state: State, lab: Lab) -> State:
    todo = rounds(
        batch_cases(plan.prompts, plan.options.size, plan.options.seed), plan.suite.batched
    )
    lab.discard(
        [
            Round(Case("", one.case.prompts, SamplingParams(max_tokens=plan.few)), one.methods)
            for one in todo
        ],
        "warming up",
    )
    return replace(state, results=lab.add(state.results, todo, "batches"))


def record(plan: Plan, state: State, lab: Lab) -> State:
    """Makes the last run one of the living schedule: its recording is drawn."""
    lab.discard(rounds(plan.cases(plan.warming[:1], (plan.lowest,)), [LIVING]), "a recorded run")
    return state


def reckon(plan: Plan, state: State, lab: Lab) -> State:
    """The profile is the middle of all that were measured, moved to where the methods ran."""
    alone = profiling.middle((state.results.profile, *state.profiles))
    like = {method.name for method in own(state.methods) if foreseen(method.how)}
    where = places(alone, [run for run in state.results.runs if run.method in like])
    found = state.updated(profile=alone.model_copy(update={"places": where}))
    lab.keep(found.results)
    return found


MEASURING: tuple[Stage, ...] = (
    start_up,
    sweep,
    warm_up,
    learn,
    run_all,
    profile,
    batches,
    profile,
    record,
    reckon,
)


def accept(plan: Plan, state: State) -> State:
    """Finds how often the draft guesses what plain decoding wrote."""
    plain = tuple(run for run in state.results.runs if run.method == PLAIN.name)
    guessed = call_in_subprocess(
        profiling.acceptance, Answered(plan.pair, plan.options.seed, plain)
    )
    return state.updated(profile=state.results.profile.model_copy(update={"acceptance": guessed}))


def forecast(plan: Plan, state: State) -> State:
    return state.updated(forecasts=forecasts(state.results, state.methods))


def drop_texts(plan: Plan, state: State) -> State:
    """Texts and passes have served their purpose; files do not hold them."""
    return state.updated(
        runs=tuple(
            run.model_copy(update={"answers": (), "passes": None}) for run in state.results.runs
        )
    )


FINISHING: tuple[Callable[[Plan, State], State], ...] = (accept, forecast, drop_texts)


def told(found: Results, which: Suite, temperature: float) -> tuple[Tried, ...]:
    """The settings that the sweep tried and measured."""
    speeds = {
        (name, method): speed
        for name, group in which.groups.items()
        for method in group
        if (speed := compare.speed(found, method.name, temperature))
    }
    return tuple(
        Tried(name=name, detail=setting(method), tokens_per_second=speed.median)
        for (name, method), speed in speeds.items()
    )


def setting(method: Method) -> str:
    how = method.how
    return (
        f"{method.facts.detail}, drafter on {len(how.drafter_cores)}"
        if isinstance(how, OutriderMethod)
        else method.facts.detail
    )
