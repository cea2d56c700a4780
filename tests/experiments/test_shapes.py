"""Draft models of one size: what is read of them, and what the page says of their speed."""

import json
from pathlib import Path

import pytest

from bench.methods.study import TEMPERATURES
from experiments.shapes import (
    MeasuredShape,
    ShapeResult,
    draw_shapes,
    read_shapes,
    results_grid,
    results_page,
)
from runtime.core.errors import InvalidRequest

WIDE = {
    "name": "128x2",
    "parameters": 950_000,
    "times": {"1": 0.001, "4": 0.0015},
    "rates": {"1": 0.5, "4": 0.75},
    "promise": 2.0,
}


def test_what_the_tuning_has_left(tmp_path: Path) -> None:
    (tmp_path / "shapes.json").write_text(json.dumps({"best": "128x2", "shapes": [WIDE]}))
    assert read_shapes(tmp_path) == [
        MeasuredShape(tmp_path / "128x2", 0.95, {1: 1.0, 4: 1.5}, {1: 0.5, 4: 0.75})
    ]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"shapes": [{}]}',
        '{"shapes": [{"name": "a", "parameters": 1, "times": 3}]}',
    ],
)
def test_folders_that_hold_no_shapes(content: str, tmp_path: Path) -> None:
    (tmp_path / "shapes.json").write_text(content)
    with pytest.raises(InvalidRequest, match="tune shapes"):
        read_shapes(tmp_path)


def test_the_page_names_the_fastest(tmp_path: Path) -> None:
    first, other = TEMPERATURES
    shapes = [
        MeasuredShape(Path(name), 0.95, {1: ms, 4: ms}, {1: 0.5, 4: 0.75})
        for name, ms in (("128x2", 1.0), ("64x8", 3.0))
    ]
    tried = [
        ShapeResult(shapes[0], {first: 60.0, other: 40.0}, {first: 2.0, other: 1.3}),
        ShapeResult(shapes[1], {first: 50.0, other: 41.0}, {first: 1.7, other: 1.4}),
    ]
    assert results_grid(tried).rows[1] == (
        "64x8",
        "0.95",
        "3.00",
        "3.00",
        "0.500",
        "0.750",
        "50.0 (1.70 x plain)",
        "41.0 (1.40 x plain)",
    )
    assert "Fastest end to end at temperature 0: 128x2." in results_page(tried, 3, "p.png")
    draw_shapes(tried, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000
