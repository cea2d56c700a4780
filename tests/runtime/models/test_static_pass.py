"""The static pass computes what the generic pass does, whatever its memory holds.

A recorded pass computes the same on every replay.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from runtime.kernels.cuda_graph import Run, run_eagerly
from runtime.kv.arena import Arena
from runtime.kv.store import TorchCache
from runtime.models.base import PassInput, Rows, causal
from runtime.models.hf import HFModel
from runtime.models.static_pass import MAX_ROWS, PassShape, StaticPass, layout_inputs, shape_of
from runtime.models.step_timing import fan_rows
from tests.contracts import test_kv
from tests.support.families import FAMILIES, VOCABULARY, tiny
from tests.support.llama_shapes import SHAPES, spread, tree
from tests.support.static_pass import (
    LONG,
    Never,
    bush,
    close,
    content,
    give,
    history,
    pair,
    recorded,
)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_computes_what_the_generic_pass_does(shape: str) -> None:
    generic, static, _ = pair(shape)
    for got, expected in zip(history(static), history(generic), strict=True):
        close(got, expected)


@pytest.mark.parametrize("shape", ["llama", "qwen3 sliding", "one head of keys"])
def test_a_recorded_pass_is_right_for_later_inputs(shape: str) -> None:
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
def test_inputs_over_its_limits_go_to_the_generic_pass(
    parts: Callable[[HFModel], list[PassInput]],
) -> None:
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


def test_a_seat_leaks_nothing_to_its_next_text() -> None:
    generic, static, step = pair(seats=1)
    first, second = static.new_cache(), static.new_cache()
    static.forward(first, causal(LONG[:20], 0))
    step._arena.memory.fill_(torch.nan)
    close(
        static.forward(second, causal(LONG[:5], 0)),
        generic.forward(generic.new_cache(), causal(LONG[:5], 0)),
    )


def test_every_input_is_on_the_device_of_the_module() -> None:
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
    assert {norm._least.device.type for norm in norms} == {"meta"}


def test_the_smallest_fitting_shape_is_chosen() -> None:
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


def test_layout_of_the_inputs() -> None:
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
