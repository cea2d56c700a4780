"""Kernels are chosen by measurement, once for each processor and shape."""

import json
from pathlib import Path

import pytest
import torch

from runtime.kernels import kernel_choice
from runtime.kernels.kernel_choice import (
    MARGIN,
    MAX_WEIGHTS,
    ROW_COUNTS,
    KernelChoice,
    Product,
    choices_file,
    choose_kernel,
    fastest,
    shape_class,
)

SHAPE = (48, 16)
CANDIDATES = ("first", "second")


class Maker:
    """Makes products of which the first takes `delay` turns of work, and counts them."""

    def __init__(self, delay: int) -> None:
        self.delay, self.made = delay, list[str]()

    def __call__(self, name: str, weight: torch.Tensor) -> Product:
        self.made.append(name)
        turns = self.delay if name == "first" else 1

        def product(rows: torch.Tensor, addend: torch.Tensor | None) -> torch.Tensor:
            for _ in range(turns):
                found = rows @ weight.t()
            return found

        return product


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def choose(make: Maker) -> KernelChoice:
    return choose_kernel(torch.float32, SHAPE, CANDIDATES, make)


def new_process() -> None:
    kernel_choice._known.clear()


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"a": [4.0], "b": [1.0]}, "b"),
        ({"a": [1.0], "b": [4.0]}, "a"),
        ({"a": [1.0], "b": [1.0 / MARGIN + 0.01]}, "a"),
        ({"a": [1.0, 9.0], "b": [2.0, 2.0]}, "b"),
        ({"a": [9.0], "b": [4.0], "c": [1.0]}, "c"),
    ],
)
def test_the_fastest_by_a_margin_is_chosen(times: dict[str, list[float]], expected: str) -> None:
    assert fastest(times) == expected


def test_a_slow_kernel_is_not_chosen_and_the_choice_is_kept() -> None:
    make = Maker(2000)
    found = choose(make)
    assert found.kernel == "second"
    assert {name: len(times) for name, times in found.times.items()} == dict.fromkeys(
        CANDIDATES, len(ROW_COUNTS)
    )
    new_process()
    assert choose(make) == found
    assert make.made == list(CANDIDATES)


def test_without_an_alternative_nothing_is_measured() -> None:
    make = Maker(1)
    assert choose_kernel(torch.float32, SHAPE, ("only",), make) == KernelChoice("only", SHAPE, {})
    assert make.made == []
    assert not choices_file().exists()


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"a": {"kernel": "first"}}', '{"a": 1}'])
def test_a_damaged_file_is_measured_again(content: str, caplog: pytest.LogCaptureFixture) -> None:
    new_process()
    choices_file().parent.mkdir(parents=True)
    choices_file().write_text(content)
    make = Maker(2000)
    assert choose(make).kernel == "second"
    assert "measuring the kernels again" in caplog.text
    (kept,) = json.loads(choices_file().read_text()).values()
    assert kept["kernel"] == "second"


def test_without_a_folder_the_choice_holds_for_the_process(folder: Path) -> None:
    (folder / "outrider").write_text("a file")
    make = Maker(2000)
    assert choose(make) == choose(make)
    assert make.made == list(CANDIDATES)


def test_another_number_of_threads_is_measured_by_itself() -> None:
    make, threads = Maker(1), torch.get_num_threads()
    choose(make)
    torch.set_num_threads(threads + 1)
    choose(make)
    torch.set_num_threads(threads)
    assert make.made == [*CANDIDATES, *CANDIDATES]


def test_fewer_outputs_stand_for_many() -> None:
    assert shape_class((96, 64)) == (96, 64)
    assert shape_class((1 << 20, 64)) == (MAX_WEIGHTS // 64, 64)
    assert shape_class((4, 2 * MAX_WEIGHTS)) == (1, 2 * MAX_WEIGHTS)
