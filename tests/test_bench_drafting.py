"""The table of ways to guess: which there are, and what the page says of runs."""

from collections.abc import Mapping

import pytest

from bench.drafting import TEMPERATURES, Found, by_rank, methods, page, paired, sizes
from bench.methods import Ours
from runtime import config


def found(name: str, temperature: float, rates: Mapping[str, float], **changes: object) -> Found:
    one = Found(name, temperature, dict(rates), tokens=200, steps=100, computed=3.0)
    for field, value in changes.items():
        setattr(one, field, value)
    return one


def test_every_head_and_every_drafter_that_ships_is_in_it() -> None:
    hows = [method.how for method in methods() if isinstance(method.how, Ours)]
    assert {head for how in hows for head in how.heads} == set(config.heads())
    assert {drafter for how in hows for drafter in how.drafters} == set(config.methods()) - {"noisy", "wrong"}
    assert len({method.name for method in methods()}) == len(hows)


def test_ratios_are_paired_by_prompt() -> None:
    above, below = found("a", 0.0, {"x": 30.0, "y": 8.0, "z": 1.0}), found("b", 0.0, {"y": 2.0, "x": 10.0})
    assert paired(above, below) == pytest.approx(3.5)


def test_acceptance_by_rank_is_that_of_all_confidences() -> None:
    tries, hits = [[0.0] * 10 for _ in range(8)], [[0.0] * 10 for _ in range(8)]
    tries[0][1], tries[0][5], hits[0][1], hits[0][5] = 30.0, 10.0, 15.0, 5.0
    assert by_rank({"promise": 0.7, "tables": {"draft": [tries, hits]}}) == {"draft": [0.5, 0.0, 0.0, 0.0]}
    assert by_rank({}) == {}


def test_the_page_has_every_method_at_every_temperature() -> None:
    names = [method.name for method in methods()]
    everything = [found(name, at, {"x": 30.0, "y": 20.0}, own={"draft-0": [1.5, 1.7]}) for at in TEMPERATURES for name in names]
    everything[3].same = False
    lines = page(everything, 2).splitlines()
    for name in names:
        assert sum(line.startswith(f"| {name} |") for line in lines) >= len(TEMPERATURES)
    assert sum("| NO |" in line for line in lines) == 1
    assert any("draft-0 1.60" in line for line in lines)


def test_what_ships_says_what_it_took() -> None:
    rows = {row[0]: row for row in sizes().rows}
    assert rows["medusa"][1].endswith(" MB")
    assert "steps" in sizes().columns
    assert all(rows[name][2] for name in ("medusa", "hidden-transfer"))
