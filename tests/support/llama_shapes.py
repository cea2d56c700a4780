"""Configures small Llama-like models and a tree of rows for them."""

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from runtime.models.base import Rows
from tests.support.families import VOCABULARY, WINDOW

TEXT = np.random.default_rng(3).integers(0, VOCABULARY, 40)
LONG = {"max_position_embeddings": 2048}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "one head of keys": ("llama", {"num_key_value_heads": 1}),
    "as many heads of keys": ("llama", {"num_key_value_heads": 4}),
    "wide heads": ("llama", {"head_dim": 24}),
    "yarn": ("llama", {"rope_parameters": YARN, **LONG}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, **LONG}),
    "dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen2 sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 sliding": (
        "qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
    ),
}


def spread(module: PreTrainedModel) -> PreTrainedModel:
    """Norms that are not all 1 and biases that are not all 0."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


def tree(start: int) -> Rows:
    """Returns a root with two children and two grandchildren."""
    visible = np.array(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]],
        dtype=np.bool_,
    )
    return Rows(TEXT[:5], start + np.array([0, 1, 1, 2, 2]), start, visible)
