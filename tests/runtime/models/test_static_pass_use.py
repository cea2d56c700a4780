"""The static pass is used on request and on GPUs if it agrees with the generic pass."""

import logging
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import pytest
import torch

from runtime.kernels.cuda_graph import GraphCapture
from runtime.models.fast_path import enable_fast_path, enable_static_path, seats_for
from runtime.models.hf import HFModel
from runtime.models.loader import Step, load_model
from runtime.models.rollback_check import check_rollback
from runtime.models.static_pass import StaticPass
from runtime.models.step_timing import step_times
from tests.support.families import FAMILIES, tiny
from tests.support.llama_shapes import spread
from tests.support.static_pass import close, history

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_a_cpu_uses_the_static_pass_only_on_request() -> None:
    model = HFModel(tiny("llama"), "small")
    enable_fast_path(model)
    assert not isinstance(model.step, StaticPass)
    assert enable_static_path(model)
    assert isinstance(model.step, StaticPass)
    assert check_rollback(model) < 1e-4


def test_a_loaded_model_uses_it_on_request(tmp_path: Path) -> None:
    tiny("qwen3", head_dim=16).save_pretrained(tmp_path)
    steps: tuple[Step, Step] = ("static", "auto")
    static, usual = (load_model(str(tmp_path), device="cpu", step=step) for step in steps)
    assert isinstance(static.step, StaticPass)
    assert not isinstance(usual.step, StaticPass)
    for got, expected in zip(history(static), history(usual), strict=True):
        close(got, expected)


def test_an_unsupported_architecture_keeps_its_pass() -> None:
    model = HFModel(FAMILIES["gpt2"](), "gpt2")
    assert not enable_static_path(model)
    assert model.step is model.generic


def test_a_static_pass_that_disagrees_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = HFModel(tiny("llama"), "twisted")
    masks = StaticPass._masks
    monkeypatch.setattr(
        StaticPass,
        "_masks",
        lambda self, hidden: [mask.clamp(min=-1.0) for mask in masks(self, hidden)],
    )
    with caplog.at_level(logging.WARNING):
        assert not enable_static_path(model)
    assert model.step is model.generic
    assert "model twisted keeps transformers' own pass: the faster one is off by" in caplog.text


@pytest.mark.parametrize(("room", "seats"), [(99, 0), (100, 1), (399, 2), (400, 4), (10**9, 8)])
def test_seats_are_a_power_of_two_that_fits(room: int, seats: int) -> None:
    assert seats_for(room, 100) == seats


def on_gpu(dtype: torch.dtype) -> tuple[HFModel, HFModel]:
    generic, static = (
        HFModel(spread(tiny("llama", head_dim=64)).to("cuda", dtype), "llama") for _ in range(2)
    )
    enable_fast_path(static)
    assert isinstance(static.step, StaticPass)
    assert isinstance(static.step._record, GraphCapture)
    return generic, static


@cuda
def test_a_replay_is_the_eager_pass() -> None:
    generic, static = on_gpu(torch.float32)
    expected = history(generic)
    for _ in range(3):
        for got, wanted in zip(history(static), expected, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-3, rtol=0)
    assert check_rollback(static) < 1e-3


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_types_on_a_gpu(
    dtype: torch.dtype, record_property: Callable[[str, object], None]
) -> None:
    """The test reports the seconds of a step and does not judge them."""
    generic, static = on_gpu(dtype)
    assert check_rollback(static) < 0.05
    for name, model in (("generic", generic), ("static", static)):
        record_property(
            f"seconds by rows, {name}", str(step_times(model, (1, 16, 64), perf_counter))
        )
