"""The layers in one list of calls are the layers one by one, bit for bit."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from runtime.kernels.jit import is_supported
from runtime.kernels.packed_weight import MAX_ROWS
from runtime.kv.store import TorchCache
from runtime.models.base import Branch, OutputSpec, PassInput, PassOutput, Rows, causal
from runtime.models.hf import HFModel
from runtime.models.llama import LlamaPass
from tests.support.families import VOCABULARY, WINDOW, tiny
from tests.support.llama_shapes import spread, tree

WIDE: dict[str, object] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 104}
# Packed in float32 too.
LARGE: dict[str, object] = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 300}
SLIDING: dict[str, object] = {
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "max_window_layers": 1,
}
CASES = [
    ("llama", WIDE, torch.bfloat16),
    ("llama", {**WIDE, "intermediate_size": 105, "num_key_value_heads": 1}, torch.bfloat16),
    ("llama", {**WIDE, "num_key_value_heads": 4}, torch.float16),
    ("llama", LARGE, torch.float32),
    ("mistral", {**WIDE, "sliding_window": WINDOW}, torch.bfloat16),
    ("qwen2", WIDE, torch.bfloat16),
    ("qwen2", {**LARGE, **SLIDING}, torch.float32),
    ("qwen3", {**WIDE, "head_dim": 24}, torch.bfloat16),
    ("qwen3", {**WIDE, **SLIDING}, torch.float16),
]
TEXT = np.random.default_rng(4).integers(0, VOCABULARY, 200)

pytestmark = pytest.mark.skipif(not is_supported(), reason="no kernel for this processor")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pair(kind: str, options: dict[str, object], dtype: torch.dtype) -> tuple[HFModel, HFModel]:
    """The model with its layers in a list, and a copy that runs them one by one."""
    listed, single = (HFModel(spread(tiny(kind, **options)).to(dtype), kind) for _ in range(2))
    for model in (listed, single):
        model.step = LlamaPass(model.module)
        assert model.step._calls is not None
    assert isinstance(single.step, LlamaPass)
    single.step._calls = None
    return listed, single


def forbid_single_layers(model: HFModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a layer by itself")

    monkeypatch.setattr(model.step, "_run_layer", fail)


def stored(cache: TorchCache) -> torch.Tensor:
    return cache.planes()[:, :, : cache.length].clone()


def bits(output: PassOutput) -> torch.Tensor:
    assert output.features is not None
    return torch.from_numpy(output.features.rows.astype(np.int64))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[2]}")
@pytest.mark.parametrize("several", [1, 3])
def test_any_rows_after_any_context(
    case: tuple[str, dict[str, object], torch.dtype],
    several: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = pair(*case)
    forbid_single_layers(models[0], monkeypatch)
    torch.set_num_threads(several)
    for context in (0, 3, WINDOW + 40):
        caches = [model.new_cache() for model in models]
        for start in range(0, context, MAX_ROWS):
            for model, cache in zip(models, caches, strict=True):
                part = TEXT[start : min(context, start + MAX_ROWS)]
                model.forward(cache, causal(part, start))
        for rows in (*range(1, 20), 33, 64, MAX_ROWS):
            found = [
                model.forward(cache, causal(TEXT[:rows], context))
                for model, cache in zip(models, caches, strict=True)
            ]
            assert torch.equal(*found)
            assert torch.equal(*(stored(cache) for cache in caches))
            for cache in caches:
                cache.truncate(context)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[2]}")
def test_texts_trees_features_and_pseudo_rows(
    case: tuple[str, dict[str, object], torch.dtype],
) -> None:
    spec = OutputSpec(
        hidden=True, branches=(Branch(1, lambda x: -x), Branch(1, lambda x: 2 * x)), features=(0, 2)
    )
    found: list[list[torch.Tensor]] = []
    for model in pair(*case):
        caches = [model.new_cache() for _ in range(3)]
        model.forward(caches[0], causal(TEXT[:30], 0))
        texts: list[tuple[Rows, int | None]] = [
            (tree(30), None),
            (causal(TEXT[:40], 0), 2),
            (causal(TEXT[:1], 0), None),
        ]
        parts = [PassInput(cache, *text) for cache, text in zip(caches, texts, strict=True)]
        seen = [*model.forward_all(parts)]
        for cache, part in zip(caches, parts, strict=True):
            cache.truncate(cache.length - len(part.rows.tokens))
        for one in model.forward_outputs(parts, OutputSpec(features=(0, 1, 2))):
            seen += [one.logits, bits(one)]
        (alone,) = model.forward_outputs([PassInput(caches[0], tree(35), branch_rows=(0, 3))], spec)
        seen += [alone.logits, alone.hidden, alone.branch_logits, bits(alone)]
        found.append(seen + [stored(cache) for cache in caches])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_results_outlive_the_next_pass() -> None:
    listed, _ = pair("llama", WIDE, torch.bfloat16)
    spec = OutputSpec(hidden=True, features=(0, 2))
    (first,) = listed.forward_outputs([PassInput(listed.new_cache(), causal(TEXT[:5], 0))], spec)
    kept = first.logits.clone(), first.hidden.clone(), bits(first)
    listed.forward_outputs([PassInput(listed.new_cache(), causal(TEXT[5:20], 0))], spec)
    for one, before in zip((first.logits, first.hidden, bits(first)), kept, strict=True):
        assert torch.equal(one, before)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({**WIDE, "attention_bias": True}, torch.bfloat16),
        ({**WIDE, "mlp_bias": True}, torch.bfloat16),
        ({**WIDE, "head_dim": 8}, torch.bfloat16),
        (WIDE, torch.float32),  # its products are torch's
    ],
)
def test_other_layers_run_one_by_one(options: dict[str, object], dtype: torch.dtype) -> None:
    assert LlamaPass(tiny("llama", **options).to(dtype))._calls is None
