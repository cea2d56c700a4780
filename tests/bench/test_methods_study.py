"""The table of ways to guess: which there are, what runs tell of them, and what the page says."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bench.core.machine import machine
from bench.core.methods import Outcome, OutriderMethod
from bench.core.results import Steps
from bench.methods.method_goals import METHOD_GOALS, MODEL, WITH_MODEL, goals_grid
from bench.methods.method_stats import (
    MethodStats,
    acceptance_by_rank,
    add_run,
    extra_step_ms,
    median_ratio,
)
from bench.methods.methods_report import (
    PLAIN,
    Study,
    methods_grid,
    methods_page,
    papers_grid,
    runs_grid,
)
from bench.methods.papers import PAPERS
from bench.methods.study import (
    HEADS,
    SHIPPED,
    TEMPERATURES,
    UNTRAINED,
    chat_methods,
    costs_of,
    methods_of,
    study_targets,
    write_study,
)
from bench.methods.weights import Cost, card_value, count_parameters, training_cost
from bench.reports.grid import Grid
from runtime.method_registry import drafting_methods, head_methods
from runtime.telemetry.tracing import STEP, Recording, Trace

EVERY = (MODEL, "ngram", "layer-skip", *HEADS)
COSTS = {name: Cost(2_000_000, "none") for name in EVERY}


def found(
    name: str, temperature: float, rates: Mapping[str, float], **changes: object
) -> MethodStats:
    one = MethodStats(
        name,
        temperature,
        dict(rates),
        {prompt: 1000 / rate for prompt, rate in rates.items()},
        tokens=200,
        steps=100,
    )
    for field, value in changes.items():
        setattr(one, field, value)
    return one


def study(*found: MethodStats) -> Study:
    return Study("a target", "About it.", found, COSTS)


def whole() -> Study:
    return study(
        *(
            found(way.name, at, {"x": 30.0, "y": 20.0})
            for at in TEMPERATURES
            for way in methods_of(EVERY)
        )
    )


def test_every_head_and_every_drafter_that_ships_is_in_it() -> None:
    hows = [way.how for way in methods_of(EVERY) if isinstance(way.how, OutriderMethod)]
    assert {head for how in hows for head in how.heads} == set(head_methods()) - {"eagle-head"}
    assert {drafter for how in hows for drafter in how.drafters} >= set(drafting_methods()) - {
        "noisy",
        "wrong",
        "block",
        "eagle",
        "s3d",
    }
    assert len({way.name for way in methods_of(EVERY)}) == len(hows)


def test_each_is_alone_and_beside_the_model() -> None:
    names = [way.name for way in methods_of((MODEL, *UNTRAINED))]
    assert names[:2] == [PLAIN, MODEL]
    assert all(name in names and WITH_MODEL + name in names for name in UNTRAINED)


def test_ratios_are_paired_by_prompt() -> None:
    above, below = (
        found("a", 0.0, {"x": 30.0, "y": 8.0, "z": 1.0}),
        found("b", 0.0, {"y": 2.0, "x": 10.0}),
    )
    assert median_ratio(above, below) == pytest.approx(3.5)
    assert extra_step_ms(
        found("a", 0.0, {}, times={"x": 40.0, "y": 35.0}),
        found("b", 0.0, {}, times={"x": 30.0, "y": 31.0}),
    ) == pytest.approx(7.0)


def test_acceptance_by_rank_is_that_of_all_confidences() -> None:
    tries, hits = [[0.0] * 10 for _ in range(8)], [[0.0] * 10 for _ in range(8)]
    tries[0][1], tries[0][5], hits[0][1], hits[0][5] = 30.0, 10.0, 15.0, 5.0
    assert acceptance_by_rank({"promise": 0.7, "tables": {"draft": [tries, hits]}}) == {
        "draft": [0.5, 0.0, 0.0, 0.0]
    }
    assert acceptance_by_rank({}) == {}


def recording(*spans: tuple[str, float, float, int]) -> Recording:
    trace = Trace("here")
    for lane, began, ended, leaves in spans:
        trace.span(lane, STEP, began, ended, leaves=leaves)
    return trace.drain()


def outcome(rounds: int, tokens: int) -> Outcome:
    steps = Steps(
        rounds=rounds,
        drafted=9,
        verified=9,
        accepted=3,
        hits=1,
        computed=0.3,
        waited=0.1,
        bookkeeping=0.1,
        by_drafter={"a-0": 3},
    )
    return Outcome((tuple(range(tokens)),), 3.0, 1.0, 1, steps)


def test_what_a_run_tells() -> None:
    one = MethodStats("a", 0.0)
    add_run(
        one,
        "x",
        outcome(5, 9),
        [recording(("a-0", 0.0, 0.5, 0), ("a-0", 1.0, 1.006, 4))],
        {},
        {"a-0": 12},
    )
    assert one.rates == {"x": 4.0}
    assert one.times == {"x": pytest.approx(100.0)}
    assert one.per_node("a-0") == pytest.approx(
        0.5
    )  # the pass that read the prompt guessed nothing
    assert one.per_node("b-0") is None
    add_run(one, "y", outcome(5, 9), [], {}, {"a-0": 8})
    assert (one.nodes, one.accepted, one.steps, one.tokens) == ({"a-0": 20}, {"a-0": 6}, 10, 18)


@pytest.mark.parametrize(("rounds", "tokens"), [(1, 9), (5, 1)])
def test_a_run_that_ended_at_once_tells_nothing(rounds: int, tokens: int) -> None:
    one = MethodStats("a", 0.0)
    add_run(one, "x", outcome(rounds, tokens), [], {}, {})
    assert not one.rates
    assert not one.steps


def test_the_page_has_every_method_at_every_temperature() -> None:
    lines = methods_page([whole()], machine(2), "p.png").splitlines()
    for name in EVERY:
        assert sum(line.startswith(f"| {name} |") for line in lines) >= 2 * len(TEMPERATURES)


def test_a_text_that_differs_is_not_hidden() -> None:
    all_ = whole()
    all_.found[3].same = False
    grids = [runs_grid(all_, at) for at in TEMPERATURES]
    assert [row[0] for grid in grids for row in grid.rows if row[-1] == "NO"] == [
        all_.found[3].name
    ]


def test_the_line_of_a_method() -> None:
    one = found(
        "ngram",
        0.0,
        {"x": 20.0},
        acceptance={"ngram": [0.5, 0.25]},
        seconds={"ngram-0": 0.1},
        nodes={"ngram-0": 50},
    )
    rows = [
        found(PLAIN, 0.0, {"x": 10.0}),
        found(MODEL, 0.0, {"x": 16.0}),
        found(WITH_MODEL + "ngram", 0.0, {"x": 24.0}),
        one,
    ]
    (line,) = [row for row in methods_grid(study(*rows), 0.0).rows if row[0] == "ngram"]
    assert line[1:] == (
        "0.50",
        "0.25",
        "-",
        "-",
        "2.00",
        "2.000",
        "-50.0",
        "20.0",
        "2.00",
        "24.0",
        "1.50",
        "2.00",
        "none",
    )
    assert (
        methods_grid(study(one), 0.0).rows == ()
    )  # without plain decoding there is nothing to compare with


def test_papers_are_of_methods_that_there_are_and_the_reason_stands_where_ours_is_less() -> None:
    assert {paper.method for paper in PAPERS} == {*EVERY, "s3d"} - {"ngram-head"}  # as ngram
    fast = [
        found(PLAIN, 0.0, {"x": 10.0}),
        found("token-recycling", 0.0, {"x": 21.0}),
        found("medusa", 0.0, {"x": 15.0}),
    ]
    rows = {row[0]: row for row in papers_grid(study(*fast)).rows}
    assert rows["token-recycling"][4:] == ("2.10 x", "-")
    assert rows["medusa"][4] == "1.50 x"
    assert rows["medusa"][5] != "-"
    assert rows["s3d"][4] == "-"


def test_parameters_of_a_folder_and_of_some_layers(tmp_path: Path) -> None:
    names = [
        "model.embed_tokens.weight",
        "model.layers.0.a.weight",
        "model.layers.1.a.weight",
        "model.layers.10.a.weight",
    ]
    save_file(
        {name: torch.zeros(2, 5) for name in names},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    assert count_parameters(tmp_path) == 40
    assert count_parameters(tmp_path, (1, 10)) == 30
    assert count_parameters(tmp_path, ()) == 10


def test_a_card_is_asked_for_what_training_took(tmp_path: Path) -> None:
    assert training_cost(tmp_path) == "not known"
    (tmp_path / "README.md").write_text(
        "| | |\n|---|---|\n| steps | 3 of 2 |\n| time of the last run | 1.0 minutes |\n"
    )
    assert training_cost(tmp_path) == "3 of 2; 1.0 minutes"
    assert card_value(tmp_path / "README.md", "data") == ""


@pytest.mark.slow
def test_what_ships_can_be_measured() -> None:
    """Widened, with its heads, and what each keeps is known."""
    first = study_targets(2)[0]
    assert first.name == SHIPPED
    assert len({prompt.tokens for prompt in first.prompts}) == len(first.prompts)
    assert list(costs_of(first)) == list(first.method_names)
    assert (
        costs_of(first)["ngram"].keeps
        == 0
        < costs_of(first)["token-recycling"].keeps
        < costs_of(first)["medusa"].keeps
    )


def test_results_are_left_in_the_folder(tmp_path: Path) -> None:
    assert (
        write_study([whole()], tmp_path / "new").read_text("utf-8").startswith("# Drafting methods")
    )
    assert {file.name for file in (tmp_path / "new").iterdir()} == {
        "methods.md",
        "methods.json",
        "methods.png",
    }


def test_goals_are_decided_by_what_was_measured() -> None:
    names = {
        "model": (10.0, 100),
        "model + token-recycling": (9.7, 100),
        "model + ngram": (12.0, 100),
        "medusa": (5.0, 90),
    }
    rows = {
        name: found(name, 0.0, {"x": rate}, tokens=tokens) for name, (rate, tokens) in names.items()
    }
    rows["hidden-transfer"] = found("hidden-transfer", 0.0, {"x": 5.0}, tokens=140, steps=100)
    one = study(
        *rows.values(),
        found(PLAIN, 0.0, {"x": 4.0}),
        found("model", 0.8, {"x": 4.0}),
        found(PLAIN, 0.8, {"x": 4.0}),
    )
    grid = goals_grid(one.by_temperature)
    assert grid.columns == ("goal", "wanted", "temperature 0", "temperature 0.8")
    assert [line[2] for line in grid.rows] == [
        "0.97, missed",
        "1.20, met",
        "1.40, met",
        "-",
        "0.50, met",
    ]
    assert [line[3] for line in grid.rows] == ["-"] * len(METHOD_GOALS)
    rows["medusa"].tokens = 140
    assert goals_grid({0.0: rows}).rows[-1][2] == "0.00, missed"


def test_a_chat_model_is_measured_with_what_ships_for_it() -> None:
    which = ("eagle", "ngram", "ngram-head", "token-recycling", "eagle-head")
    methods = {method.name: method.how for method in chat_methods(which)}
    assert next(iter(methods)) == PLAIN
    assert set(which) < set(methods)
    both = methods["eagle + ngram-head + token-recycling"]
    assert isinstance(both, OutriderMethod)
    assert (both.drafters, both.heads) == (("eagle",), ("ngram-head", "token-recycling"))
    assert "eagle-head + ngram-head + token-recycling" in methods
    page = methods_page(
        [Study("chat", "About it.", (found(PLAIN, 0.0, {"x": 10.0}),), {"eagle": Cost(1, "none")})],
        machine(2),
        "p.png",
    )
    assert "Goals" not in page


def test_columns_without_a_value_are_left_out() -> None:
    grid = Grid("t", ("a", "b", "c"), (("x", "-", "1"), ("-", "-", "2")), ("c",))
    assert grid.without_empty_columns() == Grid("t", ("a", "c"), (("x", "1"), ("-", "2")), ("c",))
    assert Grid("t", ("a",), ()).without_empty_columns().columns == ("a",)
