"""The stages of a benchmark.

Each stage takes what has been found so far and returns it with its own part added; `bench/run.py` does one after the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich.progress import Progress

from bench.core import compare, loop, profiling
from bench.core.forecasts import forecast_methods, is_forecastable
from bench.core.loop import Case, Round, cases, rounds
from bench.core.methods import LIVING, LIVING_METHODS, PLAIN, Method, OutriderMethod, Runner
from bench.core.options import (
    SWEEP_PROMPTS,
    WARM_UP_PROMPTS,
    BenchOptions,
    Suite,
    batch_cases,
    main_rounds,
    own_methods,
)
from bench.core.places import costs_in_place
from bench.core.profiling import AnsweredRuns, ProfileJob
from bench.core.prompts import Prompt
from bench.core.results import Profile, Results, SweepResult
from bench.core.subprocess_call import call_in_subprocess
from runtime.core.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """What is measured, and on which prompts.

    pair     the job that profiles the pair by itself
    prompts  enough for the runs and for the largest batch
    other_prompts   others for the sweep, for warming up and for learning
    """

    options: BenchOptions
    suite: Suite
    pair: ProfileJob
    prompts: Sequence[Prompt]
    other_prompts: Sequence[Prompt]

    @property
    def measured_prompts(self) -> Sequence[Prompt]:
        return self.prompts[: self.options.size.count]

    @property
    def sweep_prompts(self) -> Sequence[Prompt]:
        return self.other_prompts[:SWEEP_PROMPTS]

    @property
    def warm_up_prompts(self) -> Sequence[Prompt]:
        return self.other_prompts[SWEEP_PROMPTS : SWEEP_PROMPTS + WARM_UP_PROMPTS]

    @property
    def learning_prompts(self) -> Sequence[Prompt]:
        return self.other_prompts[SWEEP_PROMPTS + WARM_UP_PROMPTS :]

    @property
    def lowest_temperature(self) -> float:
        return min(self.options.size.temperatures)

    @property
    def warm_up_tokens(self) -> int:
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
class BenchState:
    """What has been found. `methods` are known once the sweep has chosen the best setting of each."""

    results: Results
    methods: tuple[Method, ...] = ()
    profiles: tuple[Profile, ...] = ()

    def updated(self, **changes: object) -> "BenchState":
        """With these fields of the results changed."""
        return replace(self, results=self.results.model_copy(update=changes))


@dataclass(frozen=True, slots=True)
class BenchTools:
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


Stage = Callable[[BenchPlan, BenchState, BenchTools], BenchState]


def run_each_once(plan: BenchPlan, state: BenchState, lab: BenchTools) -> BenchState:
    """Every runner has run before anything is measured."""
    first = [group[0] for group in plan.suite.groups.values()]
    methods = [*plan.suite.fixed, *first, *plan.suite.rivals]
    lab.discard(
        rounds(
            plan.cases(plan.warm_up_prompts[:1], (plan.lowest_temperature,), plan.warm_up_tokens),
            methods,
        ),
        "warming up",
    )
    return state


def sweep(plan: BenchPlan, state: BenchState, lab: BenchTools) -> BenchState:
    """Tries all settings on prompts that are not measured, and chooses the fastest of each method."""
    tried = tuple(method for group in plan.suite.groups.values() for method in group)
    without_keeping = replace(lab, keep=lambda results: None)
    found = without_keeping.add(
        state.results,
        rounds(plan.cases(plan.sweep_prompts, (plan.lowest_temperature,)), tried),
        "sweep",
    )
    methods = plan.suite.final(loop.best_settings(found, plan.suite.groups))
    settings = sweep_results(found, plan.suite, plan.lowest_temperature)
    return replace(state, methods=methods).updated(
        methods=tuple(method.facts for method in methods), sweep=settings
    )


def warm_up(plan: BenchPlan, state: BenchState, lab: BenchTools) -> BenchState:
    temperatures = plan.options.size.temperatures
    lab.discard(
        rounds(plan.cases(plan.warm_up_prompts, temperatures), own_methods(state.methods)),
        "warming up",
    )
    return state


def learn(plan: BenchPlan, state: BenchState, lab: BenchTools) -> BenchState:
    """The living methods learn what guesses are worth, as they do in a target that serves."""
    lab.discard(
        rounds(plan.cases(plan.learning_prompts, plan.options.size.temperatures), LIVING_METHODS),
        "learning",
    )
    return state


def run_all(plan: BenchPlan, state: BenchState, lab: BenchTools) -> BenchState:
    todo = main_rounds(plan.measured_prompts, plan.options.size, plan.options.seed, state.methods)
    return replace(state, results=lab.add(state.results, todo, "runs"))


def profile(plan: BenchPlan, state: BenchState, lab: BenchTools) -> BenchState:
    """Measures the pair by itself again: the profile speaks of the machine as the runs met it."""
    return replace(state, profiles=(*state.profiles, lab.profile()))


def batches(plan: BenchPlan, state: BenchState, lab: BenchTools) -> BenchState:
    todo = rounds(
        batch_cases(plan.prompts, plan.options.size, plan.options.seed), plan.suite.batched
    )
    lab.discard(
        [
            Round(
                Case("", one.case.prompts, SamplingParams(max_tokens=plan.warm_up_tokens)),
                one.methods,
            )
            for one in todo
        ],
        "warming up",
    )
    return replace(state, results=lab.add(state.results, todo, "batches"))


def record_living(plan: BenchPlan, state: BenchState, lab: BenchTools) -> BenchState:
    """Makes the last run one of the living schedule: its recording is drawn."""
    lab.discard(
        rounds(plan.cases(plan.warm_up_prompts[:1], (plan.lowest_temperature,)), [LIVING]),
        "a recorded run",
    )
    return state


def locate_profile(plan: BenchPlan, state: BenchState, lab: BenchTools) -> BenchState:
    """The profile is the middle of all that were measured, moved to where the methods ran."""
    alone = profiling.median_profile((state.results.profile, *state.profiles))
    like = {method.name for method in own_methods(state.methods) if is_forecastable(method.how)}
    where = costs_in_place(alone, [run for run in state.results.runs if run.method in like])
    found = state.updated(profile=alone.model_copy(update={"places": where}))
    lab.keep(found.results)
    return found


MEASURING: tuple[Stage, ...] = (
    run_each_once,
    sweep,
    warm_up,
    learn,
    run_all,
    profile,
    batches,
    profile,
    record_living,
    locate_profile,
)


def add_acceptance(plan: BenchPlan, state: BenchState) -> BenchState:
    """Finds how often the draft guesses what plain decoding wrote."""
    plain = tuple(run for run in state.results.runs if run.method == PLAIN.name)
    guessed = call_in_subprocess(
        profiling.measure_acceptance, AnsweredRuns(plan.pair, plan.options.seed, plain)
    )
    return state.updated(profile=state.results.profile.model_copy(update={"acceptance": guessed}))


def add_forecasts(plan: BenchPlan, state: BenchState) -> BenchState:
    return state.updated(forecast_methods=forecast_methods(state.results, state.methods))


def drop_texts(plan: BenchPlan, state: BenchState) -> BenchState:
    """Texts and passes have served their purpose; files do not hold them."""
    return state.updated(
        runs=tuple(
            run.model_copy(update={"answers": (), "passes": None}) for run in state.results.runs
        )
    )


FINISHING: tuple[Callable[[BenchPlan, BenchState], BenchState], ...] = (
    add_acceptance,
    add_forecasts,
    drop_texts,
)


def sweep_results(found: Results, which: Suite, temperature: float) -> tuple[SweepResult, ...]:
    """The settings that the sweep tried and measured."""
    speeds = {
        (name, method): speed
        for name, group in which.groups.items()
        for method in group
        if (speed := compare.decode_speed(found, method.name, temperature))
    }
    return tuple(
        SweepResult(name=name, detail=setting_text(method), tokens_per_second=speed.median)
        for (name, method), speed in speeds.items()
    )


def setting_text(method: Method) -> str:
    how = method.how
    return (
        f"{method.facts.detail}, drafter on {len(how.drafter_cores)}"
        if isinstance(how, OutriderMethod)
        else method.facts.detail
    )
