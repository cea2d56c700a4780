"""Architectures that cannot be rolled back exactly are refused."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from runtime.core.errors import ModelRefused
from runtime.models.base import causal
from runtime.models.fast_path import enable_fast_path
from runtime.models.hf import HFModel, check_config, max_context, relative_error
from runtime.models.prefill import prefill
from runtime.models.rollback_check import check_rollback
from tests.support.families import FAMILIES, tiny


def test_the_rollback_check_fails_if_branches_see_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = HFModel(FAMILIES["llama"](), "leaking")
    monkeypatch.setattr(
        model.generic,
        "mask",
        lambda part, window: torch.zeros((1, 1, len(part.rows.tokens), part.cache.length)),
    )
    with pytest.raises(ModelRefused, match="cannot be rolled back exactly"):
        check_rollback(model)


def test_positions_by_slot_are_refused() -> None:
    with pytest.raises(ModelRefused, match="ALiBi"):
        HFModel(tiny("falcon", alibi=True, ffn_hidden_size=48), "falcon-alibi")
    with pytest.raises(ModelRefused, match="bloom"):
        HFModel(tiny("bloom"), "bloom")


@pytest.mark.parametrize(
    "model_type",
    [
        "mamba",
        "rwkv",
        "qwen3_next",
        "jamba",
        "recurrent_gemma",
        "falcon_mamba",
        "llama4_text",
        "bart",
    ],
)
def test_models_with_other_state_than_keys_and_values_are_refused(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    with (
        torch.device("meta"),
        pytest.raises(ModelRefused, match=f"^model x \\({model_type}\\) .*: choose a"),
    ):
        check_config(config, AutoModelForCausalLM._model_mapping[type(config)], "x")


def test_a_recurrent_model_in_memory_is_refused() -> None:
    module = tiny("mamba", state_size=4, expand=2, conv_kernel=2, time_step_rank=2)
    with pytest.raises(ModelRefused, match=r"recurrent state|linear_attention"):
        HFModel(module, "mamba")


def test_longrope_is_limited_to_its_original_context() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    model = HFModel(
        tiny("phi3", original_max_position_embeddings=64, rope_parameters=rope), "phi3-long"
    )
    assert model.context == 64
    assert check_rollback(model) < 1e-4


@pytest.mark.parametrize(
    ("stated", "rope", "context"),
    [
        (64, {"factor": 4.0, "original_max_position_embeddings": 64}, 256),
        (64, {"factor": 4.0}, 256),  # the original context is the stated one
        (256, {"factor": 4.0, "original_max_position_embeddings": 64}, 256),
        (96, {"factor": 4.0, "original_max_position_embeddings": 64}, 256),
        (160, {"factor": None, "original_max_position_embeddings": 64}, 160),
    ],
)
def test_yarn_has_its_original_context_times_the_factor(
    stated: int, rope: dict[str, Any], context: int
) -> None:
    config = LlamaConfig(
        max_position_embeddings=stated,
        rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, **rope},
    )
    assert max_context(config, "yarn") == context


@pytest.mark.parametrize("rope_type", ["dynamic", "linear"])
def test_other_scaled_positions_keep_the_stated_context(rope_type: str) -> None:
    """Angles of `dynamic` change with the length; with `linear` the stated one may be scaled."""
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0}
    config = LlamaConfig(max_position_embeddings=64, rope_parameters=rope)
    assert max_context(config, rope_type) == 64


def test_yarn_beyond_the_original_context_is_what_transformers_computes() -> None:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = HFModel(tiny("qwen2", max_position_embeddings=64, rope_parameters=rope), "yarn")
    enable_fast_path(model)
    tokens = np.random.default_rng(3).integers(1, model.vocabulary, 250)
    cache = model.new_cache()
    prefill(model, cache, tokens[:200])
    got = model.forward(cache, causal(tokens[200:], 200))
    with torch.inference_mode():
        expected = model.module(torch.from_numpy(tokens)[None]).logits[0, 200:].float()
    assert relative_error(got, expected) < 1e-4


def test_no_context_length_is_refused() -> None:
    with pytest.raises(ModelRefused, match=r"endless .* has no context length"):
        max_context(PreTrainedConfig(), "endless")
