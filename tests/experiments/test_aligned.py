"""The page compares draft models that were aligned to their target in different ways."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from experiments.aligned import main, read_trained, results_grid, verdict_lines
from runtime.core.errors import InvalidRequest


def trained(
    folder: Path, first: Mapping[float, float], losses: tuple[float, ...] = (3.0, 2.0)
) -> Path:
    """Writes a result as `outrider train draft` does; `first` is the first-guess rate."""
    folder.mkdir()
    rates = [
        {"temperature": at, "positions": [{"1": rate, "8": 0.9}], "chain": 1 + rate}
        for at, rate in first.items()
    ]
    (folder / "training.json").write_text(
        json.dumps({"losses": losses, "acceptance": rates, "seconds": 90.0})
    )
    (folder / "README.md").write_text(
        "| | |\n|---|---|\n| settings | loss kl, shape 64x2 |\n| steps | 2 of 3 texts |\n"
    )
    return folder


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [
        trained(tmp_path / "before", {0.0: 0.50, 0.8: 0.40}),
        trained(tmp_path / "after", {0.0: 0.56, 0.8: 0.44}),
    ]


def test_the_others_are_compared_with_the_first(two: list[Path]) -> None:
    rows = results_grid([read_trained(folder) for folder in two]).rows
    assert [row[:4] for row in rows] == [
        ("before", "0", "50.0", "90.0"),
        ("after", "0", "56.0 (+6.0)", "90.0 (+0.0)"),
        ("before", "0.8", "40.0", "90.0"),
        ("after", "0.8", "44.0 (+4.0)", "90.0 (+0.0)"),
    ]
    assert rows[0][4:] == ("3.000 to 2.500", "1.5")


def test_the_goal_is_five_points(two: list[Path]) -> None:
    at_zero, above = verdict_lines([read_trained(folder) for folder in two])
    assert at_zero.endswith("+6.0 points (goal +5: met)")
    assert above.endswith("+4.0 points (goal +5: missed)")


def test_the_command(two: list[Path], tmp_path: Path) -> None:
    main([*map(str, two), "--folder", str(tmp_path / "results")])
    page = (tmp_path / "results" / "aligned.md").read_text("utf-8")
    assert "| after | loss kl, shape 64x2 | 2 of 3 texts |" in page
    assert (tmp_path / "results" / "aligned.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"losses": [], "acceptance": [], "seconds": 1}',
        '{"losses": [1], "acceptance": [], "seconds": 1}',
    ],
)
def test_folders_that_no_training_has_made(content: str, tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text(content)
    with pytest.raises(InvalidRequest, match="training"):
        read_trained(tmp_path)
