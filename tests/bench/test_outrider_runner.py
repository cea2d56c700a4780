"""The benchmark's own methods: what is read from recordings and answers, sizes and settings."""

import asyncio
import os
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from actors import cli
from bench.core.forecasts import forecast_methods
from bench.core.methods import (
    GREEDY,
    LIVING,
    PLAIN,
    PLAIN_METHODS,
    TRANSFORMERS_METHODS,
    Method,
    OutriderMethod,
)
from bench.core.options import (
    FULL,
    QUICK,
    Size,
    batch_cases,
    choose_dtype,
    choose_suite,
    expected_seconds,
    main_rounds,
    validated,
)
from bench.core.outrider_runner import (
    OutriderRunner,
    TimedAnswer,
    ask_all,
    outcome_of,
    schedule_config,
)
from bench.core.prompts import Prompt, read_prompts
from bench.core.recording_stats import mean_lead, recorded_steps, round_trip
from bench.core.subprocess_call import call_in_subprocess
from runtime.core.errors import InvalidRequest, Unavailable
from runtime.core.messages import Chunk, Request, Stats
from runtime.core.sampling_params import SamplingParams
from runtime.telemetry.tracing import (
    BOOKKEEPING,
    COMMIT,
    COMPUTE,
    GROWTH,
    LEAD,
    TARGET,
    WAIT,
    Recording,
    Trace,
)
from tests.support.benchmarks import run, synthetic

PROMPTS = [Prompt(f"p{number}", (number, number + 1)) for number in range(1, 9)]


def recordings() -> list[Recording]:
    """Two steps of a target, and a drafter whose clock began 100 seconds earlier."""
    target, drafter = Trace(TARGET, offset=1000.0), Trace("draft-0", offset=900.0)
    target.span(TARGET, COMPUTE, 1.0, 1.5)
    target.span(TARGET, BOOKKEEPING, 1.5, 1.6)
    target.span(TARGET, WAIT, 1.6, 1.8)
    target.span(TARGET, COMPUTE, 2.0, 2.4)
    target.flow(COMMIT, 7, 1.5, TARGET, begins=True)
    target.flow(COMMIT, 8, 2.4, TARGET, begins=True)
    target.flow(GROWTH, 9, 1.75, TARGET, begins=False)
    drafter.count(LEAD, 101.2, 3.0)
    drafter.count(LEAD, 101.9, 5.0)
    drafter.count(LEAD, 102.3, 9.0)
    drafter.flow(COMMIT, 7, 101.503, "draft-0", begins=False)
    drafter.flow(GROWTH, 9, 101.748, "draft-0", begins=True)
    return [target.drain(), drafter.drain()]


def test_the_first_step_is_no_decoding() -> None:
    target, drafter = recordings()
    stats = Stats(4, 6, 2, 10, 8, 4, 1, (0, 0, 2), by_drafter={"draft-0": 4}, computed=0.9)
    found = recorded_steps(stats, target, [drafter])
    assert (found.computed, found.waited, found.bookkeeping) == pytest.approx((0.4, 0.2, 0.1))
    assert (found.rounds, found.accepted, found.by_drafter) == (2, 4, {"draft-0": 4})
    assert found.lead == pytest.approx(2.5)  # 0 when the first step began, 5 at the second


def test_without_drafters_there_is_no_lead_and_no_wire() -> None:
    target, drafter = recordings()
    assert mean_lead(target, []) is None
    assert round_trip([target]) is None
    assert round_trip([target, drafter]) == pytest.approx(0.005)


def test_an_outcome_counts_from_the_moment_when_every_prompt_has_begun() -> None:
    quick = TimedAnswer([1, 2, 3, 4], [(10.1, 1), (10.4, 3), (10.9, 4)])
    slow = TimedAnswer([5, 6], [(10.5, 1), (11.5, 2)])
    found = outcome_of(10.0, [quick, slow])
    assert found.outputs == ((1, 2, 3, 4), (5, 6))
    assert (found.seconds, found.first_seconds) == pytest.approx((1.5, 0.5))
    assert found.first_tokens == 4


class Failing:
    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        yield Chunk(("a",), (1,), ("",))
        yield Chunk((), (), (), "error", error="out of memory")


def test_a_request_that_fails_is_no_result() -> None:
    with pytest.raises(Unavailable, match="out of memory"):
        asyncio.run(ask_all(Failing(), [(1, 2)], SamplingParams()))


def test_methods_of_others_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="is transformers'"):
        OutriderRunner({}, {}).run(TRANSFORMERS_METHODS[0], PROMPTS[:1], SamplingParams())


def test_what_a_process_apart_finds_or_raises_comes_back() -> None:
    assert call_in_subprocess(abs, -3) == 3
    with pytest.raises(InvalidRequest, match="/nowhere") as caught:
        call_in_subprocess(read_prompts, Path("/nowhere"))
    assert caught.value.param == "prompts"
    with pytest.raises(Unavailable, match="code 3"):
        call_in_subprocess(os._exit, 3)


def test_bf16_is_for_processors_that_multiply_it() -> None:
    assert choose_dtype("auto", ["avx2", "avx512f"]) == "float32"
    assert choose_dtype("auto", ["avx512f", "amx_bf16"]) == "bfloat16"
    assert choose_dtype("bfloat16", []) == "bfloat16"


def test_sizes_are_checked_and_ordered() -> None:
    assert validated(Size(1, 1, 8, (0.8, 0.0, 0.8), (8, 1, 4))) == Size(1, 1, 8, (0.0, 0.8), (4, 8))
    for wrong, named in (
        (Size(0, 1, 8, (0.0,), ()), "count"),
        (Size(1, 0, 8, (0.0,), ()), "repetitions"),
        (Size(1, 1, 1, (0.0,), ()), "new_tokens"),
        (Size(1, 1, 8, (-1.0,), ()), "temperature"),
        (Size(1, 1, 8, (0.0,), (0,)), "batch"),
    ):
        with pytest.raises(InvalidRequest, match=named):
            validated(wrong)


def test_ours_are_repeated_at_the_lowest_temperature() -> None:
    found = main_rounds(PROMPTS[:3], Size(3, 2, 8, (0.0, 0.8), ()), 5, [PLAIN, GREEDY])
    assert [len(one.methods) for one in found] == [2] * 6 + [1] * 3
    assert {one.case.sampling.seed for one in found if one.case.sampling.temperature == 0.8} == {5}
    assert {(one.case.sampling.seed, one.methods) for one in found[6:]} == {(6, (PLAIN,))}
    assert [
        len(case.prompts)
        for case in batch_cases(PROMPTS, Size(3, 2, 8, (0.0, 0.8), (4, 8, 16)), seed=5)
    ] == [4, 8]


def test_a_quick_benchmark_is_a_part_of_the_whole() -> None:
    whole, part = choose_suite(False, 12), choose_suite(True, 12)
    assert {method.name for method in part.all} < {method.name for method in whole.all}
    assert {*PLAIN_METHODS, *TRANSFORMERS_METHODS} < set(whole.all)
    assert {
        dict(method.how.options)["passes"]
        for method in whole.groups["pearl"]
        if isinstance(method.how, OutriderMethod)
    } == {12, 6, 3}
    assert expected_seconds(part, QUICK, 0.035) < 120
    assert 15 * 60 < expected_seconds(whole, FULL, 0.035) < 35 * 60


def test_the_forecast_of_plain_decoding_is_its_step() -> None:
    methods = [
        *PLAIN_METHODS,
        Method("living + ngram", OutriderMethod("living", drafters=("model", "ngram"))),
        *TRANSFORMERS_METHODS,
    ]
    found = forecast_methods(
        synthetic().model_copy(
            update={
                "runs": (run("plain", 40.0), run("plain, 2 cores", 60.0), run("assisted", 50.0))
            }
        ),
        methods,
    )
    assert [forecast.method for forecast in found] == [
        "plain"
    ]  # the planner knows no second core, no other drafter, no transformers
    assert found[0].tokens_per_second == pytest.approx(1 / 0.025, rel=0.05)


def test_options_become_the_schedule() -> None:
    assert schedule_config(OutriderMethod("sync", (("rows", 15), ("width", 4)))).rows == 15
    assert (
        schedule_config(
            LIVING.how if isinstance(LIVING.how, OutriderMethod) else OutriderMethod("plain")
        ).policy
        == "living"
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--count", "0"], "count 0"),
        (["--temperature", "-1"], "temperature -1"),
        (["--batch", "-2"], "batch -2"),
        (["--dtype", "float8"], "float8"),
        (["--widen"], "--target"),
    ],
)
def test_wrong_flags_are_named(
    arguments: list[str],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["outrider", "bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
