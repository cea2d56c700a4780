"""The fast pass computes what transformers computes; otherwise it is not used."""

import logging

import numpy as np
import pytest
import torch

from runtime.models.base import PassInput, causal
from runtime.models.fast_path import enable_fast_path
from runtime.models.hf import HFModel
from runtime.models.llama import INITIAL_POSITIONS, LlamaPass, is_llama
from runtime.models.rollback_check import check_rollback
from tests.support.families import FAMILIES, tiny
from tests.support.llama_shapes import SHAPES, TEXT, spread, tree

ROUNDING = 4e-6  # of the largest value: sums of float32 in another order; AMD's kernels reach 2e-6


def pair(shape: str, dtype: torch.dtype = torch.float32) -> tuple[HFModel, HFModel]:
    """The model with transformers' pass, and a copy with the short one."""
    kind, options = SHAPES[shape]
    generic, quick = (HFModel(spread(tiny(kind, **options)).to(dtype), shape) for _ in range(2))
    enable_fast_path(quick)
    assert isinstance(quick.step, LlamaPass)
    return generic, quick


@pytest.mark.parametrize("shape", SHAPES)
def test_the_short_pass_is_the_long_one(shape: str) -> None:
    found: list[list[torch.Tensor]] = []
    for model in pair(shape):
        kv, other = model.new_cache(), model.new_cache()
        logits = [
            model.forward(kv, causal(TEXT[:9], 0)),
            model.forward(kv, causal(TEXT[9:10], 9)),
            model.forward(kv, tree(10)),
        ]
        kv.keep(11, [12, 14])
        logits += [
            model.forward(kv, causal(TEXT[:3], 13), last=1),
            model.forward(kv, causal(TEXT[:2], 16), last=0),
        ]
        logits += model.forward_all(
            [
                PassInput(kv, tree(18)),
                PassInput(other, causal(TEXT, 0), last=2),
                PassInput(model.new_cache(), causal(TEXT[:1], 0)),
            ]
        )
        found.append(
            [*logits, *(kv.plane(*place)[0] for layer in kv.layers for place in layer.places)]
        )
    assert [len(logits) for logits in found[1][:8]] == [9, 1, 5, 1, 0, 5, 2, 1]
    for expected, got in zip(*found, strict=True):
        assert got.dtype == torch.float32
        scale = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(got, expected, atol=ROUNDING * scale, rtol=0)


@pytest.mark.parametrize("shape", ["llama", "llama3", "yarn"])
def test_angles_beyond_those_computed_at_first(shape: str) -> None:
    text = np.resize(TEXT, INITIAL_POSITIONS + 70 if shape != "llama" else 512)
    generic, quick = pair(shape)
    for length in (500, len(text)):
        logits = [
            model.forward(model.new_cache(), causal(text[:length], 0), last=3)
            for model in (generic, quick)
        ]
        torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["llama", "biases", "qwen3 sliding"])
def test_short_types(shape: str, dtype: torch.dtype) -> None:
    _, quick = pair(shape, dtype)
    assert check_rollback(quick) < 0.05
    kv = quick.new_cache()
    assert quick.forward(kv, causal(TEXT, 0)).dtype == torch.float32
    assert kv.planes().dtype == dtype


@pytest.mark.parametrize("shape", ["llama", "biases", "tied", "qwen3"])
def test_the_module_stays_whole_and_takes_no_more_memory(shape: str) -> None:
    generic, quick = pair(shape)
    ids = torch.from_numpy(TEXT[None])
    with torch.inference_mode():
        assert torch.equal(
            quick.module(ids, use_cache=False).logits, generic.module(ids, use_cache=False).logits
        )
    attention = quick.module.model.layers[0].self_attn
    assert isinstance(quick.step, LlamaPass)
    fused = quick.step._layers[0].qkv.weight
    assert fused.data_ptr() == attention.q_proj.weight.data_ptr()
    assert (
        fused.untyped_storage().data_ptr() == attention.v_proj.weight.untyped_storage().data_ptr()
    )
    assert quick.step._head.weight.data_ptr() == quick.module.lm_head.weight.data_ptr()


@pytest.mark.parametrize("family", ["phi3", "gpt2", "mixtral", "gemma2"])
def test_others_keep_the_pass_of_transformers(family: str) -> None:
    model = HFModel(FAMILIES[family](), family)
    assert not is_llama(model.module)
    enable_fast_path(model)
    assert model.step is model.generic


def test_another_activation_does_not_fit() -> None:
    assert not is_llama(tiny("llama", hidden_act="gelu"))
    assert is_llama(tiny("llama"))


def test_a_pass_that_disagrees_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = HFModel(tiny("llama"), "twisted")
    table = LlamaPass._rope_table
    monkeypatch.setattr(
        LlamaPass, "_rope_table", lambda self, positions: table(self, positions) * 1.1
    )
    with caplog.at_level(logging.WARNING):
        enable_fast_path(model)
    assert model.step is model.generic
    assert "model twisted keeps transformers' own pass: the faster one is off by" in caplog.text


def test_a_pass_that_cannot_be_made_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = HFModel(tiny("llama"), "odd")
    monkeypatch.delattr(LlamaPass, "_view")
    with caplog.at_level(logging.WARNING):
        enable_fast_path(model)
    assert model.step is model.generic
    assert "does not fit it" in caplog.text
