"""The order of the benchmark's runs, what is kept of them, and the choice of the best setting."""

import io
from collections.abc import Sequence
from itertools import chain

import pytest
from rich.console import Console
from rich.progress import Progress

from bench.core.compare import decode_speed
from bench.core.loop import (
    best_settings,
    cases,
    collect,
    digest,
    measure,
    progress_bar,
    rounds,
    run_of,
)
from bench.core.machine import cpu_facts, machine
from bench.core.methods import (
    AMUSD,
    BATCHED,
    LIVING_METHODS,
    PLAIN_METHODS,
    TRANSFORMERS_METHODS,
    Method,
    Outcome,
    OutriderMethod,
    TransformersMethod,
    sweep_candidates,
)
from bench.core.profiling import median_profile
from bench.core.prompts import Prompt
from bench.core.results import Profile, Results
from runtime.core.errors import Unavailable
from runtime.core.sampling_params import SamplingParams
from tests.support.benchmarks import run, synthetic

PROMPTS = [Prompt(name, (1, 2, 3)) for name in "abcde"]


class Counted:
    """Takes as many seconds per method as its name has letters; fails at its `fails`-th run."""

    def __init__(self, fails: int | None = None) -> None:
        self.calls: list[tuple[str, str, float]] = []
        self.fails = fails

    def run(self, method: Method, prompts: Sequence[Prompt], sampling: SamplingParams) -> Outcome:
        self.calls.append(
            (method.name, "".join(prompt.name for prompt in prompts), sampling.temperature)
        )
        if len(self.calls) == self.fails:
            raise Unavailable("the process has ended")
        return Outcome(tuple((7,) * 4 for _ in prompts), 1.0 + len(method.name), 1.0, len(prompts))


def methods(*names: str) -> list[Method]:
    return [Method(name, OutriderMethod("plain")) for name in names]


def silent() -> Progress:
    return Progress(console=Console(file=io.StringIO()))


def empty() -> Results:
    return synthetic().model_copy(update={"runs": ()})


def test_cases_are_all_prompts_at_all_temperatures_in_every_repetition() -> None:
    found = cases(PROMPTS[:2], 1, (0.0, 0.8), 2, 16, 5)
    assert [(case.name, case.sampling.temperature, case.repetition) for case in found] == [
        (name, temperature, repetition)
        for repetition in (0, 1)
        for name in "ab"
        for temperature in (0.0, 0.8)
    ]
    assert [case.sampling.seed for case in found] == [5] * 4 + [6] * 4
    assert {case.sampling.max_tokens for case in found} == {16}


def test_groups_are_full() -> None:
    found = cases(PROMPTS, 2, (0.0,), 1, 16, 0)
    assert [[prompt.name for prompt in case.prompts] for case in found] == [["a", "b"], ["c", "d"]]
    assert [case.name for case in found] == ["a and 1 more", "c and 1 more"]
    assert cases(PROMPTS, 6, (0.0,), 1, 16, 0) == []


def test_methods_are_interleaved_and_each_has_each_place() -> None:
    found = rounds(cases(PROMPTS[:3], 1, (0.0,), 1, 16, 0), methods("x", "y", "z"))
    assert ["".join(method.name for method in one.methods) for one in found] == [
        "xyz",
        "yzx",
        "zxy",
    ]


def test_what_is_measured_is_kept_round_by_round() -> None:
    plan = rounds(cases(PROMPTS[:2], 1, (0.0,), 1, 16, 0), methods("x", "yy"))
    kept: list[int] = []
    runner = Counted()
    found = collect(
        empty(),
        measure(plan, runner, silent(), "all"),
        lambda results: kept.append(len(results.runs)),
    )
    assert kept == [2, 4]
    assert [call[:2] for call in runner.calls] == [("x", "a"), ("yy", "a"), ("yy", "b"), ("x", "b")]
    middle = decode_speed(found, "yy")
    assert middle is not None
    assert (middle.median, middle.count) == (1.5, 2)


def test_an_interruption_keeps_the_rounds_that_were_done() -> None:
    plan = rounds(cases(PROMPTS[:2], 1, (0.0,), 1, 16, 0), methods("x", "yy"))
    kept: list[Results] = []
    with pytest.raises(Unavailable):
        collect(empty(), measure(plan, Counted(fails=4), silent(), "all"), kept.append)
    assert [(one.method, one.prompt) for one in kept[-1].runs] == [("x", "a"), ("yy", "a")]


def test_a_record_is_of_the_whole_batch() -> None:
    case = cases(PROMPTS[:2], 2, (0.8,), 1, 16, 0)[0]
    found = run_of(methods("x")[0], case, Outcome(((1, 2), (3,)), 2.0, 0.5, 2))
    assert (found.batch, found.tokens, found.first_tokens, found.seconds, found.temperature) == (
        2,
        3,
        2,
        2.0,
        0.8,
    )


def test_a_digest_tells_texts_apart() -> None:
    texts = [((1, 2), (3,)), ((1,), (2, 3)), ((1, 2, 3),), ((1, 2), (4,))]
    assert len({digest(Outcome(text, 1.0, 0.5, 1)) for text in texts}) == 4
    assert digest(Outcome(((1, 2),), 1.0, 0.5, 1)) == digest(Outcome(((1, 2),), 9.0, 0.1, 1))


def test_the_sweep_names_the_fastest_setting() -> None:
    groups = {
        "sync chain": methods("sync chain #0", "sync chain #1"),
        "sync tree": methods("sync tree #0"),
    }
    runs = (
        run("sync chain #0", 40.0),
        run("sync chain #1", 60.0),
        run("sync chain #0", 90.0, temperature=0.8),
    )
    found = best_settings(empty().model_copy(update={"runs": runs}), groups)
    assert found == [Method("sync chain", groups["sync chain"][1].how)]


def test_names_are_unique_and_two_cores_are_the_most() -> None:
    every = [
        *PLAIN_METHODS,
        *LIVING_METHODS,
        AMUSD,
        *TRANSFORMERS_METHODS,
        *chain.from_iterable(sweep_candidates(12).values()),
    ]
    assert len({method.name for method in every}) == len(every)
    assert {method.facts.cores for method in every} == {1, 2}
    assert set(BATCHED) < set(every)
    assert all(method.how.cores == (0, 1) for method in every if method.name.endswith("2 cores"))


def test_facts_say_what_a_method_is() -> None:
    tree = Method("sync tree", OutriderMethod("sync", (("rows", 15),), ("model", "ngram"))).facts
    assert (tree.who, tree.cores, tree.detail) == (
        "ours",
        2,
        "sync, rows 15, drafters: model and ngram",
    )
    helped = Method("assisted 5", TransformersMethod("assisted", 5)).facts
    assert (helped.who, helped.cores, helped.detail) == (
        "transformers",
        1,
        "generate(assistant_model=...), 5 guesses, constant",
    )


def test_the_machine_tells_its_processor() -> None:
    facts = cpu_facts(
        "processor\t: 0\nmodel name\t: A: B\nflags\t\t: fpu amx_bf16\n\n"
        "processor\t: 1\nmodel name\t: C\n"
    )
    assert (facts["model name"], facts["flags"]) == ("A: B", "fpu amx_bf16")
    assert machine(2).memory_gib > 0.1
    assert machine(2, "a GPU").gpu == "a GPU"


def test_the_bar_shows_the_time_left() -> None:
    with progress_bar() as progress:
        progress.console.file = io.StringIO()
        assert list(measure([], Counted(), progress, "nothing")) == []


def test_a_profile_is_the_middle_of_several() -> None:
    profiles = [
        Profile(target={1: one, 8: 2 * one}, draft={1: one / 10}, floor=one, text=text)
        for one, text in ((3.0, 0.0), (1.0, 0.5), (2.0, 0.1))
    ]
    found = median_profile(profiles)
    assert (found.target, found.draft) == ({1: 2.0, 8: 4.0}, {1: 0.2})
    assert (found.floor, found.text) == (2.0, 0.1)
    assert median_profile(profiles[:1]) == profiles[0]
