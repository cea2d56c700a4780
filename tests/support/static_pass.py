"""Builds static passes, records them as a CUDA graph would, and reads histories with them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from runtime.kernels.cuda_graph import Record, Run, run_eagerly
from runtime.kv.arena import Arena
from runtime.kv.store import TorchCache
from runtime.models.base import OutputSpec, PassInput, PassOutput, Rows, causal
from runtime.models.hf import HFModel
from runtime.models.static_pass import StaticPass
from runtime.models.step_timing import fan_rows
from tests.support.families import VOCABULARY, tiny
from tests.support.llama_shapes import SHAPES, spread, tree

LONG = np.random.default_rng(4).integers(0, VOCABULARY, 512)


class Recorder(TorchDispatchMode):
    """Replays the operations of one call on its own tensors, as a CUDA graph does."""

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
    """Implements Record. `counts` gets the number of operations of each recording."""
    recorder = Recorder()
    with recorder:
        output = function()
    counts.append(len(recorder.calls))

    def replay() -> torch.Tensor:
        recorder.replay()
        return output

    return replay


class Never:
    """Is a Pass that must never be called."""

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
    """Puts a StaticPass into the model; a call that bypasses it fails."""
    step = StaticPass(model.module, Arena(model.new_cache(), seats, slots), Never(), record)
    model.step = step
    return step


def pair(shape: str = "llama", **options: Any) -> tuple[HFModel, HFModel, StaticPass]:
    """Returns the model with transformers' pass, a copy with the static pass, and that pass."""
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
    """Returns logits of trees, rollbacks, a fork and several texts, then the keys and values."""
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
