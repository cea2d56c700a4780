"""The pass of fixed shapes computes what the generic one does, whatever is in its memory; recorded once and replayed, it still does."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from runtime.kernels.cuda_graph import GraphCapture, Record, Run, run_eagerly
from runtime.kv.arena import Arena
from runtime.kv.store import TorchCache
from runtime.models.base import OutputSpec, PassInput, PassOutput, Rows, causal
from runtime.models.fast_path import enable_fast_path, enable_static_path, seats_for
from runtime.models.hf import HFModel
from runtime.models.loader import Step, load_model
from runtime.models.rollback_check import check_rollback
from runtime.models.static_pass import MAX_ROWS, PassShape, StaticPass, layout_inputs, shape_of
from runtime.models.step_timing import fan_rows, step_times
from tests.contracts import test_kv
from tests.runtime.models.test_llama import SHAPES, spread, tree
from tests.support.families import FAMILIES, VOCABULARY, tiny

LONG = np.random.default_rng(4).integers(0, VOCABULARY, 512)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Recorder(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: the operations of one call, run again on the very tensors of that call."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for new, old in zip(tree_leaves(func(*args, **kwargs)), tree_leaves(out), strict=True):
                if isinstance(new, torch.Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)


def recorded(counts: list[int], function: Run) -> Run:
    """A Record. `counts` gets the number of operations of each recording."""
    recorder = Recorder()
    with recorder:
        output = function()
    counts.append(len(recorder.calls))

    def replay() -> torch.Tensor:
        recorder.replay()
        return output

    return replay


class Never:
    """A Pass that nothing may come to."""

    def __call__(self, parts: Sequence[PassInput]) -> list[torch.Tensor]:
        raise AssertionError("read by the other pass")

    def check(self, output_spec: OutputSpec) -> None:
        raise AssertionError("asked of the other pass")

    def show(self, parts: Sequence[PassInput], output_spec: OutputSpec) -> list[PassOutput]:
        raise AssertionError("shown by the other pass")

    def unembed(self, hidden: torch.Tensor) -> torch.Tensor:
        raise AssertionError("asked of the other pass")


def give(
    model: HFModel, seats: int = 2, slots: int = 512, record: Record = run_eagerly
) -> StaticPass:
    """Put a StaticPass into the model. What goes past it fails."""
    step = StaticPass(model.module, Arena(model.new_cache(), seats, slots), Never(), record)
    model.step = step
    return step


def pair(shape: str = "llama", **options: Any) -> tuple[HFModel, HFModel, StaticPass]:
    """The model with transformers' pass, and a copy with the static one."""
    kind, config = SHAPES[shape]
    generic, static = (HFModel(spread(tiny(kind, **config)), shape) for _ in range(2))
    return generic, static, give(static, **options)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=5e-5, rtol=0)


def bush(start: int, rows: int) -> Rows:
    return replace(fan_rows(start, rows), tokens=LONG[start : start + rows])


def content(kv: TorchCache) -> list[torch.Tensor]:
    return [kv.plane(*place).clone() for layer in kv.layers for place in layer.places]


def history(model: HFModel) -> list[torch.Tensor]:
    """Logits of trees, rollbacks, a fork and several texts, then the keys and values."""
    kv, other = model.new_cache(), model.new_cache()
    logits = [
        model.forward(kv, causal(LONG[:9], 0)),
        model.forward(kv, causal(LONG[9:10], 9)),
        model.forward(kv, tree(10)),
    ]
    kv.keep(11, [12, 14])
    logits += [
        model.forward(kv, causal(LONG[:3], 13), last=1),
        model.forward(kv, causal(LONG[:2], 16), last=0),
    ]
    logits += model.forward_all(
        [PassInput(kv, tree(18)), PassInput(other, causal(LONG[:40], 0), last=2)]
    )
    kv.truncate(12)
    fork = kv.fork(7)
    logits += model.forward_all(
        [PassInput(fork, tree(7), last=3), PassInput(kv, causal(LONG[:1], 12), last=0)]
    )
    logits.append(model.forward(other, tree(40)))
    return [*logits, *content(kv), *content(other), *content(fork)]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_computes_what_the_generic_pass_does(shape: str) -> None:
    generic, static, _ = pair(shape)
    for got, expected in zip(history(static), history(generic), strict=True):
        close(got, expected)


@pytest.mark.parametrize("shape", ["llama", "qwen3 sliding", "one head of keys"])
def test_what_is_recorded_once_holds_for_every_later_input(shape: str) -> None:
    """The same operations on the same memory, nothing decided anew, as a CUDA graph has it."""
    counts: list[int] = []
    generic, static, step = pair(shape, record=partial(recorded, counts))
    expected = history(generic)
    for turn in range(2):
        for got, wanted in zip(history(static), expected, strict=True):
            close(got, wanted)
        if turn == 0:
            assert len(counts) == len(step._runs)
    assert len(counts) == len(step._runs) > 3
    assert min(counts) > 20


def test_logits_outlive_the_next_replay() -> None:
    _, static, _ = pair(record=partial(recorded, []))
    kv = static.new_cache()
    static.forward(kv, causal(LONG[:4], 0))
    first = static.forward(kv, causal(LONG[4:5], 4))
    before = first.clone()
    static.forward(kv, causal(LONG[5:6], 5))
    assert torch.equal(first, before)


@pytest.mark.parametrize("rows", [*range(1, 18), 31, 32, 33, 64, 65, MAX_ROWS])
def test_every_number_of_rows(rows: int) -> None:
    generic, static, step = pair()
    found = []
    for model in (generic, static):
        kv = model.new_cache()
        model.forward(kv, causal(LONG[:20], 0), last=0)
        found.append([model.forward(kv, bush(20, rows)), *content(kv)])
    for expected, got in zip(*found, strict=True):
        close(got, expected)
    assert {shape.rows for shape in step._buffers} == {32, 1 << (rows - 1).bit_length()}


def test_every_length_across_a_border_of_slots() -> None:
    generic, static, step = pair()
    caches = [model.new_cache() for model in (generic, static)]
    generic.forward(caches[0], causal(LONG[:250], 0))
    for start in (0, 125):
        static.forward(caches[1], causal(LONG[start : start + 125], start), last=0)
    for start in range(250, 262):
        expected, got = (
            model.forward(kv, causal(LONG[start : start + 1], start))
            for model, kv in zip((generic, static), caches, strict=True)
        )
        close(got, expected)
        assert (PassShape(0, 1, 1, 512) in step._buffers) == (start >= 256)
    for kv in caches:
        kv.keep(200, list(range(255, 262)))
    expected, got = (
        model.forward(kv, tree(207)) for model, kv in zip((generic, static), caches, strict=True)
    )
    close(got, expected)


def test_more_texts_than_seats_take_turns() -> None:
    generic, static, _ = pair(seats=2)
    caches = [[model.new_cache() for _ in range(5)] for model in (generic, static)]
    rng = np.random.default_rng(8)
    for _ in range(40):
        chosen = rng.choice(5, int(rng.integers(1, 3)), replace=False)
        widths = rng.integers(1, 6, len(chosen))
        logits = []
        for model, own in zip((generic, static), caches, strict=True):
            parts = [
                PassInput(own[i], bush(own[i].length, int(w)))
                for i, w in zip(chosen, widths, strict=True)
            ]
            logits.append(torch.cat(model.forward_all(parts)))
            for i, width in zip(chosen, widths, strict=True):
                own[i].keep(
                    own[i].length - int(width) + 1, [own[i].length - 1] if width > 1 else []
                )
        close(logits[1], logits[0])
    for expected, got in zip(*caches, strict=True):
        assert got.length == expected.length > 0
        for planes in zip(content(got), content(expected), strict=True):
            close(*planes)


def test_a_block_spans_the_seats_between() -> None:
    generic, static, step = pair(seats=4)
    found = []
    for model in (generic, static):
        caches = [model.new_cache() for _ in range(4)]
        model.forward_all(
            [PassInput(kv, causal(LONG[i : i + 5], 0)) for i, kv in enumerate(caches)]
        )
        found.append(torch.cat(model.forward_all([PassInput(caches[i], tree(5)) for i in (2, 1)])))
        found.append(model.forward(caches[3], tree(5)))
    close(found[2], found[0])
    close(found[3], found[1])
    assert set(step._buffers) == {
        PassShape(0, 4, 32, 256),
        PassShape(0, 4, 16, 256),
        PassShape(3, 1, 8, 256),
    }


def test_any_history_reads_as_a_fresh_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HFModel(FAMILIES["llama"](), "llama")
    give(model)
    monkeypatch.setattr(test_kv, "hf_model", lambda family: model)
    test_kv.test_any_history_reads_as_a_fresh_prefill("llama")


@pytest.mark.parametrize(
    "parts",
    [
        lambda model: [PassInput(model.new_cache(), causal(LONG[: MAX_ROWS + 1], 0))],
        lambda model: [PassInput(model.new_cache(), causal(LONG[:2], 0)) for _ in range(3)],
        lambda model: [
            PassInput(
                model.new_cache(), Rows(LONG[:1], np.array([300]), 0, np.ones((1, 1), np.bool_))
            )
        ],
    ],
    ids=["rows", "texts", "positions"],
)
def test_what_is_too_much_is_read_otherwise(parts: Callable[[HFModel], list[PassInput]]) -> None:
    generic, static, _ = pair(seats=2, slots=256)
    with pytest.raises(AssertionError, match="other pass"):
        static.forward_all(parts(static))
    static.step = StaticPass(
        static.module, Arena(static.new_cache(), 2, 256), static.generic, run_eagerly
    )
    close(
        torch.cat(static.forward_all(parts(static))), torch.cat(generic.forward_all(parts(generic)))
    )


def test_a_text_outgrows_its_seat_and_comes_back() -> None:
    generic, static, _ = pair(slots=32)
    step = StaticPass(static.module, Arena(static.new_cache(), 1, 32), static.generic, run_eagerly)
    static.step = step
    caches = [model.new_cache() for model in (generic, static)]
    seated = []
    for length, row in ((0, 20), (20, 12), (32, 1), (33, 9), (30, 1), (31, 1)):
        logits = []
        for model, kv in zip((generic, static), caches, strict=True):
            kv.truncate(length)
            logits.append(model.forward(kv, causal(LONG[length : length + row], length)))
        close(logits[1], logits[0])
        seated.append(step._arena._owner(0) is caches[1])
    assert seated == [True, True, False, False, True, True]
    for planes in zip(content(caches[1]), content(caches[0]), strict=True):
        close(*planes)


def test_a_pass_that_fails_leaves_the_caches_as_they_were() -> None:
    def fails(function: Run) -> Run:
        raise RuntimeError("no capture")

    generic, static, step = pair(record=run_eagerly)
    caches = [model.new_cache() for model in (generic, static)]
    for model, kv in zip((generic, static), caches, strict=True):
        model.forward(kv, causal(LONG[:10], 0))
    fresh, before = static.new_cache(), content(caches[1])
    step._record = fails
    with pytest.raises(RuntimeError, match="no capture"):
        static.forward_all([PassInput(caches[1], tree(10)), PassInput(fresh, tree(0))])
    assert (caches[1].length, fresh.length) == (10, 0)
    assert caches[1].positions.tolist() == list(range(10))
    assert all(torch.equal(now, then) for now, then in zip(content(caches[1]), before, strict=True))
    step._record = run_eagerly
    close(static.forward(caches[1], tree(10)), generic.forward(caches[0], tree(10)))


def test_nothing_that_a_text_left_in_its_seat_reaches_the_next() -> None:
    generic, static, step = pair(seats=1)
    first, second = static.new_cache(), static.new_cache()
    static.forward(first, causal(LONG[:20], 0))
    step._arena.memory.fill_(torch.nan)
    close(
        static.forward(second, causal(LONG[:5], 0)),
        generic.forward(generic.new_cache(), causal(LONG[:5], 0)),
    )


def test_all_that_it_reads_is_on_the_device_of_the_module() -> None:
    """No GPU here: shapes on the meta device, which refuses tensors of another."""
    module = spread(tiny("qwen3", head_dim=16)).to("meta")
    like = TorchCache([((2, 16), (2, 16))] * 2, 600, torch.float32, module.device)
    step = StaticPass(module, Arena(like, 4, 512), Never(), run_eagerly)
    shape = PassShape(2, 2, 8, 256)
    with torch.inference_mode():
        logits = step._compute(shape, step._buffers_for(shape), True)
    assert (logits.device.type, logits.shape) == ("meta", (8, VOCABULARY))
    # Scalars of the CPU would be let pass.
    norms = [
        step._norm,
        *(
            norm
            for layer in step._layers
            for norm in (layer.before, layer.after, layer.heads)
            if norm is not None
        ),
    ]
    assert {norm.least.device.type for norm in norms} == {"meta"}


def test_the_least_shape() -> None:
    kv = [
        TorchCache([((2, 8), (2, 8))], 3000, torch.float32, torch.device("cpu")) for _ in range(2)
    ]
    kv[0].append(256)
    kv[1].append(257)
    parts = [PassInput(cache, fan_rows(0, rows)) for cache, rows in zip(kv, (1, 8), strict=True)]
    assert shape_of(parts[:1], [5], 2304) == PassShape(5, 1, 1, 256)
    assert shape_of(parts[1:], [0], 2304) == PassShape(0, 1, 8, 512)
    assert shape_of(parts, [4, 5], 2304) == PassShape(4, 2, 16, 512)
    assert shape_of(parts, [6, 1], 2304) == PassShape(0, 8, 16, 512)
    kv[0].append(1900)
    assert shape_of(parts[:1], [2], 2304) == PassShape(2, 1, 1, 2304)


def test_what_a_frame_holds() -> None:
    kv = [TorchCache([((2, 8), (2, 8))], 90, torch.float32, torch.device("cpu")) for _ in range(2)]
    for cache, length, n in ((kv[0], 3, 2), (kv[1], 1, 1)):
        cache.append(length)
        cache.append(n)
        cache.positions[:] = np.arange(length + n)
    parts = [
        PassInput(kv[0], causal(np.array([7, 8]), 3)),
        PassInput(kv[1], causal(np.array([9]), 1)),
    ]
    ids, hidden = layout_inputs(parts, [3, 2], PassShape(2, 2, 4, 6), 40, {"all": None, "near": 2})
    assert ids.tolist() == [
        [7, 8, 9, 0],
        [3, 4, 1, 0],
        [3 * 41 + 3, 3 * 41 + 4, 2 * 41 + 1, 40],
        [4 + 0, 4 + 1, 2, 0],
    ]
    assert (~hidden[0]).astype(int).tolist() == [
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
    ]
    assert (~hidden[1]).astype(int).tolist() == [
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
    ]


def test_a_cpu_gets_it_only_when_asked() -> None:
    model = HFModel(tiny("llama"), "small")
    enable_fast_path(model)
    assert not isinstance(model.step, StaticPass)
    assert enable_static_path(model)
    assert isinstance(model.step, StaticPass)
    assert check_rollback(model) < 1e-4


def test_a_loaded_model_has_it_on_request(tmp_path: Path) -> None:
    tiny("qwen3", head_dim=16).save_pretrained(tmp_path)
    steps: tuple[Step, Step] = ("static", "auto")
    static, usual = (load_model(str(tmp_path), device="cpu", step=step) for step in steps)
    assert isinstance(static.step, StaticPass)
    assert not isinstance(usual.step, StaticPass)
    for got, expected in zip(history(static), history(usual), strict=True):
        close(got, expected)


def test_a_model_built_otherwise_keeps_its_pass() -> None:
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
    """The seconds of a step are reported, not judged."""
    generic, static = on_gpu(dtype)
    assert check_rollback(static) < 0.05
    for name, model in (("generic", generic), ("static", static)):
        record_property(
            f"seconds by rows, {name}", str(step_times(model, (1, 16, 64), perf_counter))
        )
