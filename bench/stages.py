"""The stages of a benchmark.

Each stage takes the state and returns it with its results added; `bench/run.py` runs them in order.
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
    """The measured methods and their prompts.

    pair           the job that profiles the pair alone
    prompts        enough for the runs and for the largest batch
    other_prompts  prompts for sweep, warm-up and learning
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
    def all_prompts(self) -> Sequence[Prompt]:
        return [*self.prompts, *self.other_prompts]

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
        """The new tokens of a warm-up text."""
        return max(2, self.options.size.new_tokens // 4)

    def cases(
        self,
        prompts: Sequence[Prompt],
        temperatures: Sequence[float],
        new_tokens: int | None = None,
    ) -> list[Case]:
        """Return one case per prompt and temperature."""
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
    """What has been measured so far. `methods` is set once the sweep has chosen the best
    settings."""

    results: Results
    methods: tuple[Method, ...] = ()
    profiles: tuple[Profile, ...] = ()

    def updated(self, **changes: object) -> "BenchState":
        """Return the state with these fields of the results changed.

        Raises TypeError for a name that is no field: `model_copy` would store it unseen.
        """
        if unknown := changes.keys() - Results.model_fields.keys():
            raise TypeError(f"results have no field {', '.join(sorted(unknown))}")
        return replace(self, results=self.results.model_copy(update=changes))


@dataclass(frozen=True, slots=True)
class BenchTools:
    """The tools of the stages: `keep` stores the results after each round; `profile` measures the
    pair alone."""

    runner: Runner
    progress: Progress
    keep: Callable[[Results], None]
    profile: Callable[[], Profile]

    def discard(self, plan: Sequence[Round], note: str) -> None:
        """Run the rounds only to warm caches and to let methods learn."""
        for _ in loop.measure(plan, self.runner, self.progress, note):
            pass

    def add(self, results: Results, plan: Sequence[Round], note: str) -> Results:
        """Return the results with the runs of these rounds, stored round by round."""
        return loop.collect(
            results, loop.measure(plan, self.runner, self.progress, note), self.keep
        )


Stage = Callable[[BenchPlan, BenchState, BenchTools], BenchState]


def run_each_once(plan: BenchPlan, state: BenchState, lab: BenchTools) -> BenchState:
    """Run every runner once before anything is measured."""
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
    """Try all settings on prompts that are not measured, and choose the fastest of each method."""
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
    """Let the living methods calibrate their guesses, as a serving target does."""
    lab.discard(
        rounds(
            plan.cases(plan.learning_prompts, plan.options.size.temperatures),
            [method for method in LIVING_METHODS if method in plan.suite.fixed],
        ),
        "learning",
    )
    return state


def run_all(plan: BenchPlan, state: BenchState, lab: BenchTools) -> BenchState:
    todo = main_rounds(plan.measured_prompts, plan.options.size, plan.options.seed, state.methods)
    return replace(state, results=lab.add(state.results, todo, "runs"))


def profile(plan: BenchPlan, state: BenchState, lab: BenchTools) -> BenchState:
    """Profile the pair again, so that the profile reflects the machine during the runs."""
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
    """Make a run of the living schedule the last one, because its recording is drawn."""
    lab.discard(
        rounds(plan.cases(plan.warm_up_prompts[:1], (plan.lowest_temperature,)), [LIVING]),
        "a recorded run",
    )
    return state


def locate_profile(plan: BenchPlan, state: BenchState, lab: BenchTools) -> BenchState:
    """Combine all profiles by their medians, and scale them to the recorded passes."""
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
    """Measure how often the draft guesses the texts of plain decoding."""
    plain = tuple(run for run in state.results.runs if run.method == PLAIN.name)
    guessed = call_in_subprocess(
        profiling.measure_acceptance, AnsweredRuns(plan.pair, plan.options.seed, plain)
    )
    return state.updated(profile=state.results.profile.model_copy(update={"acceptance": guessed}))


def add_forecasts(plan: BenchPlan, state: BenchState) -> BenchState:
    return state.updated(forecasts=forecast_methods(state.results, state.methods))


def drop_texts(plan: BenchPlan, state: BenchState) -> BenchState:
    """Remove texts and passes, which are not stored."""
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
    """Return the settings that the sweep measured."""
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
