"""Each stage of a benchmark adds its part; a later failure keeps what was measured."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from bench.core.methods import LIVING, PLAIN, Method, Outcome
from bench.core.options import QUICK, BenchOptions, choose_suite
from bench.core.profiling import ProfileJob
from bench.core.prompts import Prompt
from bench.core.results import Profile, Results
from bench.stages import (
    MEASURING,
    BenchPlan,
    BenchState,
    BenchTools,
    add_forecasts,
    drop_texts,
    profile,
    record_living,
    run_all,
    sweep,
)
from runtime.core.errors import Unavailable
from runtime.core.sampling_params import SamplingParams
from tests.support.benchmarks import synthetic

PROMPTS = tuple(Prompt(name, (1, 2, 3)) for name in "abcd")
ASIDES = tuple(Prompt(name, (1, 2, 3)) for name in "stuv")
SIZE = replace(QUICK, count=2, new_tokens=8, batches=(2,))
OPTIONS = BenchOptions(
    "target", "draft", False, "float32", None, SIZE, 1, True, Path("nowhere"), "small"
)
PLAN = BenchPlan(
    OPTIONS, choose_suite(True, 4), ProfileJob("target", "draft", "float32", 0), PROMPTS, ASIDES
)


class Scripted:
    """Is fastest with the second setting of a swept method; fails at a prompt named `fails`."""

    def __init__(self, fails: str = "") -> None:
        self.calls: list[tuple[str, str, int]] = []
        self.fails = fails

    def run(self, method: Method, prompts: Sequence[Prompt], sampling: SamplingParams) -> Outcome:
        names = "".join(prompt.name for prompt in prompts)
        self.calls.append((method.name, names, sampling.max_tokens))
        if names == self.fails:
            raise Unavailable("the process has ended")
        seconds = 1.5 if method.name.endswith("#2") else 2.0
        return Outcome(tuple((7,) * 4 for _ in prompts), seconds, 1.0, len(prompts))


def start() -> BenchState:
    return BenchState(
        synthetic().model_copy(update={"methods": (), "runs": (), "sweep": (), "forecasts": ()})
    )


def lab(runner: Scripted, kept: list[Results]) -> BenchTools:
    slower = synthetic().profile.model_copy(
        update={"target": {rows: 3 * time for rows, time in synthetic().profile.target.items()}}
    )
    return BenchTools(
        runner, Progress(console=Console(file=io.StringIO())), kept.append, lambda: slower
    )


def test_all_stages_make_complete_results() -> None:
    runner, kept, state = Scripted(), list[Results](), start()
    for stage in MEASURING:
        state = stage(PLAN, state, lab(runner, kept))
    assert [facts.name for facts in state.results.methods] == [
        "plain",
        "living",
        "sync tree",
        "transformers greedy",
        "assisted 5",
    ]
    singles = {(run.method, run.prompt) for run in state.results.runs if run.batch == 1}
    assert singles == {(facts.name, prompt) for facts in state.results.methods for prompt in "ab"}
    assert {run.method for run in state.results.runs if run.batch == 2} == {
        method.name for method in PLAN.suite.batched
    }
    assert state.results.profile.target[1] == pytest.approx(
        3 * synthetic().profile.target[1]
    )  # the median of three
    assert runner.calls[-1] == (LIVING.name, "u", 8), (
        "the last run is the one whose recording is drawn"
    )
    assert kept[-1] == state.results


def test_the_sweep_chooses_the_fastest_setting_and_keeps_no_run() -> None:
    kept: list[Results] = []
    state = sweep(PLAN, start(), lab(Scripted(), kept))
    tree = next(method for method in state.methods if method.name == "sync tree")
    assert tree.how == PLAN.suite.groups["sync tree"][-1].how
    assert [one.tokens_per_second for one in state.results.sweep] == [
        pytest.approx(3.0),
        pytest.approx(6.0),
    ]
    assert (state.results.runs, kept) == ((), [])


def test_what_was_measured_is_kept_where_a_later_round_fails() -> None:
    kept: list[Results] = []
    state = replace(start(), methods=(PLAIN, LIVING))
    with pytest.raises(Unavailable):
        run_all(PLAN, state, lab(Scripted(fails="b"), kept))
    assert [(run.method, run.prompt) for run in kept[-1].runs] == [("plain", "a"), ("living", "a")]


def test_stages_change_nothing_that_they_were_given() -> None:
    state = replace(start(), methods=(PLAIN, LIVING))
    before = state.results.model_copy(deep=True)
    after = profile(PLAN, run_all(PLAN, state, lab(Scripted(), [])), lab(Scripted(), []))
    assert (state.results, state.profiles) == (before, ())
    assert (len(after.results.runs), len(after.profiles)) == (4, 1)
    assert record_living(PLAN, after, lab(Scripted(), [])) == after


def test_files_hold_no_texts() -> None:
    state = run_all(PLAN, replace(start(), methods=(PLAIN, LIVING)), lab(Scripted(), []))
    assert all(run.answers for run in state.results.runs)
    kept = drop_texts(PLAN, add_forecasts(PLAN, state))
    assert not any(run.answers or run.passes for run in kept.results.runs)


def test_an_empty_profile_forecasts_nothing() -> None:
    state = BenchState(start().results.model_copy(update={"profile": Profile()}), (PLAIN, LIVING))
    assert add_forecasts(PLAN, state).results.forecasts == ()
