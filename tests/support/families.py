"""Builds one tiny, seeded random model of each family that the runtime reads exactly."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from runtime.models.fast_path import enable_fast_path
from runtime.models.hf import HFModel

VOCABULARY = 96
WINDOW = 6  # of the sliding layers: smaller than the texts of the tests


def tiny(model_type: str, **options: Any) -> PreTrainedModel:
    """Weights are spread widely enough that greedy output varies and experts and heads differ."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    config = AutoConfig.for_model(model_type, **{**shape, **options})
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 1.5 / min(parameter.shape[-2:]) ** 0.5)
        module.get_input_embeddings().weight.normal_(0.0, 1.0)
    return module


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tiny("llama"),
    "qwen2": lambda: tiny("qwen2"),
    "qwen2-sliding": lambda: tiny(
        "qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": lambda: tiny("qwen3", head_dim=16),
    "mistral": lambda: tiny("mistral", sliding_window=WINDOW),
    "phi3": lambda: tiny("phi3"),
    "gpt2": lambda: tiny("gpt2", n_inner=48),
    "opt": lambda: tiny("opt", ffn_dim=48, word_embed_proj_dim=32),
    "gpt_neox": lambda: tiny("gpt_neox"),
    "falcon": lambda: tiny("falcon", alibi=False, ffn_hidden_size=48),
    "mixtral": lambda: tiny(
        "mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW
    ),
    "gemma2": lambda: tiny("gemma2", head_dim=8, sliding_window=WINDOW),
    "gemma3": lambda: tiny(
        "gemma3_text",
        head_dim=8,
        sliding_window=WINDOW,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}


@cache
def hf_model(family: str) -> HFModel:
    """The family's model, made once in a process, with the pass that a loaded one would have."""
    model = HFModel(FAMILIES[family](), family)
    enable_fast_path(model)
    return model
