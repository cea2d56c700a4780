"""A faster pass is compared in float32, where rounding hides no fault."""

import logging

import pytest
import torch

from runtime.models.fast_path import enable_fast_path, kernels_of
from runtime.models.hf import HFModel, relative_error
from runtime.models.layer_subset import SAMPLE_LAYERS, SAMPLE_TOKENS, float32_sample
from runtime.models.llama import LlamaPass
from tests.support.families import VOCABULARY, WINDOW, tiny
from tests.support.llama_shapes import SHAPES, spread


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sample_computes_what_the_first_layers_compute(shape: str) -> None:
    kind, options = SHAPES[shape]
    whole, ids = spread(tiny(kind, **options)), torch.arange(12)[None]
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.copy_(parameter.bfloat16())
        expected = whole(ids).logits[0]
        sample = float32_sample(whole.to(torch.bfloat16))
        assert relative_error(sample(ids).logits[0], expected) < 1e-6


def test_a_sample_is_small_and_has_every_type_of_layer() -> None:
    options = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3}
    model = tiny("qwen2", num_hidden_layers=5, vocab_size=2 * SAMPLE_TOKENS, **options)
    sample = float32_sample(model)
    assert sample.config.layer_types == ["full_attention"] * SAMPLE_LAYERS + ["sliding_attention"]
    assert sample.config.vocab_size == SAMPLE_TOKENS
    assert torch.equal(
        sample.model.layers[2].mlp.up_proj.weight, model.model.layers[3].mlp.up_proj.weight
    )
    assert len(model.model.layers) == 5


def test_rounding_is_no_fault() -> None:
    """Rounding alone moves some logits of this model by a third."""
    module = tiny("llama", num_hidden_layers=8)
    with torch.no_grad():
        for parameter in module.model.layers.parameters():
            if parameter.dim() == 2:
                parameter.mul_(2.0)
    model = HFModel(module.to(torch.bfloat16), "noisy")
    enable_fast_path(model)
    assert isinstance(model.step, LlamaPass)
    assert len(kernels_of(model)) == 4 * 8 + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_fault_is_seen_in_16_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, table = HFModel(tiny("llama").to(dtype), "twisted"), LlamaPass._rope_table
    monkeypatch.setattr(
        LlamaPass, "_rope_table", lambda self, positions: table(self, positions) * 1.002
    )
    with caplog.at_level(logging.WARNING):
        enable_fast_path(model)
    assert model.step is model.generic
    assert "in float32" in caplog.text
    assert model.vocabulary == VOCABULARY
