"""From results to answers, tables, pictures and a page."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from bench.core import compare, results
from bench.core.methods import LIVING, LLAMA_CPP_METHODS, PLAIN
from bench.core.results import Results, Run
from bench.core.summary_stats import Spread
from bench.reports import report, tables
from bench.reports.goals import GOALS, findings
from runtime.core.errors import InvalidRequest
from tests.support.benchmarks import METHODS, run, steps, synthetic


def of(*runs: results.Run, **changes: object) -> Results:
    return synthetic().model_copy(update={"runs": runs, "forecasts": (), **changes})


def near(found: Spread | None, low: float, median: float, high: float, count: int) -> None:
    assert found is not None
    assert (found.low, found.median, found.high) == pytest.approx((low, median, high))
    assert found.count == count


def test_speed_is_that_of_decoding() -> None:
    found = of(
        run("plain", 40.0),
        run("plain", 50.0, 1),
        run("plain", 80.0, temperature=0.8),
        run("living", 100.0, batch=4),
    )
    near(compare.decode_speed(found, "plain"), 42.5, 45.0, 47.5, 2)
    rate = 128 / (0.25 + 127 / 80)
    near(compare.overall_speed(found, "plain", 0.8), rate, rate, rate, 1)
    assert compare.decode_speed(found, "living") is None
    assert compare.temperatures(found) == [0.0, 0.8]
    assert compare.batches(found) == [1, 4]


def test_a_run_that_ends_with_its_first_token_has_no_speed() -> None:
    found = of(run("plain", 40.0, tokens=1), run("plain", 50.0, 1))
    near(compare.decode_speed(found, "plain"), 50.0, 50.0, 50.0, 1)
    assert compare.aggregate_rate(found, "plain") == pytest.approx(50.0)


def test_ratios_and_the_fastest() -> None:
    found = of(
        run("plain", 40.0),
        run("plain", 10.0, 1),
        run("living", 80.0),
        run("living", 30.0, 1),
        run("amusd", 900.0, 2),
    )
    near(compare.speed_ratio(found, "living", "plain"), 2.25, 2.5, 2.75, 2)
    assert compare.speed_ratio(found, "living", "amusd") is None
    assert compare.fastest_method(found, ["plain", "living", "pearl"]) == "living"
    assert compare.fastest_method(found, ["pearl"]) is None
    assert compare.aggregate_rate(found, "plain") == pytest.approx(2 * 127 / (127 / 40 + 127 / 10))


def test_rivals_are_transformers_speculative_methods_on_any_cores() -> None:
    names = compare.transformers_methods(synthetic())
    assert len(names) == 10
    assert {"assisted", "prompt lookup, 2 cores"} < set(names)
    assert not [name for name in names if "greedy" in name]


def test_agreement_counts_equal_texts() -> None:
    found = of(
        run("plain", 40.0),
        run("plain", 40.0, 1),
        run("living", 80.0),
        run("living", 80.0, 1, text="b"),
        run("living", 80.0, 2),
    )
    assert compare.agreement(found, "living", "plain") == (1, 2)


def test_shares_of_the_targets_time() -> None:
    seconds = 127 / 50
    found = of(
        run("living", 50.0, steps=steps(seconds, 0.8, 0.1, 0.04)),
        run("living", 50.0, 1, steps=steps(seconds, 0.9, 0.0, 0.02)),
    )
    expected = {"compute": 0.85, "wait": 0.05, "bookkeeping": 0.03, "rest": 0.07}
    assert compare.time_shares(found, "living") == pytest.approx(expected)
    total = compare.total_steps(found, "living")
    assert total is not None
    assert (total.rounds, total.accepted, total.by_drafter) == (
        80,
        176,
        {"model-0": 160, "ngram-0": 16},
    )
    assert total.lead == pytest.approx(3.2)
    assert compare.time_shares(found, "plain") is None
    assert compare.total_steps(found, "plain") is None


def test_the_bound_and_the_share_of_it() -> None:
    found = of(
        run("living", 60.0),
        profile=results.Profile(target={1: 0.02, 2: 0.02}, draft={1: 0.002}, acceptance=(half(),)),
    )
    limit = compare.bound_of(found)
    assert limit is not None
    assert limit.rate == pytest.approx(75.0)
    assert limit.rows == 2
    assert compare.bound_share(found, "living") == pytest.approx(0.8)
    assert compare.bound_of(found, 0.8) is None
    assert compare.bound_share(found, "living", 0.8) is None


def half() -> results.Acceptance:
    return results.Acceptance(temperature=0.0, ranks={1: 0.5, 2: 0.6})


def test_goals_are_met_missed_or_not_measured() -> None:
    verdicts = {found.goal.what: (found.measured, found.verdict) for found in findings(synthetic())}
    assert verdicts["living / plain, batch 8"] == ("1.61", "met")
    assert verdicts["living with a drafter that is always wrong / plain"][1] == "missed"
    assert verdicts["target's time: wait"] == ("8%", "met")
    assert verdicts["planner's worst forecast against measurement"][1] == "met"
    assert {found.verdict for found in findings(of())} == {"-"}
    assert len(verdicts) == len(GOALS)


def test_a_limit_is_within_its_goal() -> None:
    for goal in GOALS:
        worse = goal.limit + 0.001 if goal.at_most else goal.limit - 0.001
        assert goal.met(goal.limit)
        assert not goal.met(worse)


def test_goals_compare_methods_that_there_are() -> None:
    names = {method.name for method in METHODS}
    measured = [found.goal.what for found in findings(synthetic()) if found.value is not None]
    assert len(measured) == len(GOALS)
    assert set(tables.REFERENCES) < names


def test_a_trained_drafter_has_goals_of_its_own() -> None:
    found = of(
        run("plain", 40.0),
        run("plain", 40.0, 1),
        run("living", 90.0, steps=steps(127 / 90)),
        run("living", 38.0, 1, steps=steps(127 / 38)),
        run("llama.cpp", 50.0),
        run("llama.cpp", 50.0, 1),
        methods=tuple(method.facts for method in (PLAIN, LIVING, LLAMA_CPP_METHODS[0])),
    )
    pair = found.pair.model_copy(update={"method": "eagle"})
    shown = {
        one.goal.what: one.measured
        for one in findings(found.model_copy(update={"pair": pair}))
        if one.value is not None
    }
    assert shown == {
        "living / plain": "1.60",
        "living / best of llama.cpp on one core or two": "1.28",
        "tokens per step of living": "3.20",
        "living / plain on the worst prompt": "0.95",
    }


def test_categories_have_rows_if_they_hold_several_prompts() -> None:
    def runs(name: str, prompts: dict[str, float]) -> list[Run]:
        return [
            run(name, rate, steps=steps(127 / rate)).model_copy(update={"prompt": prompt})
            for prompt, rate in prompts.items()
        ]

    plain = dict.fromkeys(("qa:1", "qa:2", "rag:7"), 40.0)
    found = of(*runs("plain", plain), *runs("living", {"qa:1": 60, "qa:2": 100, "rag:7": 160}))
    rows = tables.categories(found, 0.0).rows
    assert [(row[0], row[1], row[4], row[5]) for row in rows] == [
        ("qa", "2", "2.00 (1.75 to 2.25)", "3.20"),
        ("rag", "1", "4.00 (4.00 to 4.00)", "3.20"),
    ]
    alone = of(*runs("plain", {"qa:1": 40.0}), *runs("living", {"qa:1": 60.0}))
    assert tables.categories(alone, 0.0).rows == ()


def test_results_survive_the_file(tmp_path: Path) -> None:
    found = synthetic()
    results.write_results(found, tmp_path / "deep" / "x.json")
    assert results.read_results(tmp_path / "deep" / "x.json") == found
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["x.json"]


def test_files_that_are_no_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read"):
        results.read_results(tmp_path / "none.json")
    for text, message in (
        ("{", "content"),
        ('{"name": "x"}', "machine"),
        (synthetic().model_dump_json().replace('"cores"', '"coars"'), "cores"),
    ):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(InvalidRequest, match=message):
            results.read_results(tmp_path / "x.json")


def test_the_page_shows_every_picture_and_every_goal(tmp_path: Path) -> None:
    page = report.write_report(synthetic(), tmp_path)
    text = page.read_text("utf-8")
    pictures = re.findall(r"!\[\w+\]\((.*?)\)", text)
    assert sorted(pictures) == sorted(file.name for file in tmp_path.glob("*.png"))
    assert len(pictures) == 4
    assert all((tmp_path / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert all(goal.what in text for goal in GOALS)
    assert "| living / plain, batch 16 | at least 0.98 | 1.08 | met |" in text
    for line in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({row.count("|") for row in line.splitlines()}) == 1


def test_a_page_of_nothing_has_goals_and_no_pictures(tmp_path: Path) -> None:
    text = report.write_report(of(profile=results.Profile()), tmp_path).read_text("utf-8")
    assert text.count("not measured") == len(GOALS)
    assert "## Speed" not in text
    assert not list(tmp_path.glob("*.png"))


def test_methods_stand_by_falling_speed() -> None:
    grid = tables.speeds(
        of(run("plain", 40.0), run("living", 120.0), run("assisted", 60.0, text="b")), 0.0
    )
    assert [row[0] for row in grid.rows] == ["living", "assisted", "plain"]
    assert grid.rows[0][3:5] == ("120.0 (120.0 to 120.0)", "3.00 (3.00 to 3.00)")
    assert [row[-1] for row in grid.rows] == ["1 of 1", "0 of 1", "1 of 1"]


def test_the_terminal_shows_the_tables() -> None:
    console = Console(file=io.StringIO(), width=200)
    report.print_report(synthetic(), console)
    text = console.file.getvalue() if isinstance(console.file, io.StringIO) else ""
    for title in (
        "temperature 0",
        "temperature 0.8",
        "batches",
        "step times",
        "acceptance",
        "bound",
        "the planner's forecast",
        "goals",
    ):
        assert title in text
