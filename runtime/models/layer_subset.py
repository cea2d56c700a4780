"""Reduces a model to some of its layers: for self-speculation, and as a sample for comparisons."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from runtime.core.errors import ModelRefused

SAMPLE_LAYERS = 2
SAMPLE_TOKENS = 1024


def truncated_config(
    config: PreTrainedConfig, layers: Sequence[int], name: str
) -> PreTrainedConfig:
    """Return `config` without the layers after the last of `layers`.

    Raises ModelRefused unless `layers` are rising layer numbers of the model.
    """
    count: int = config.get_text_config(decoder=True).num_hidden_layers
    if (
        not layers
        or list(layers) != sorted(set(layers))
        or not 0 <= layers[0] <= layers[-1] < count
    ):
        raise ModelRefused(
            f"layers {str(list(layers))[:48]} are not some of the {count} of {name}: "
            f"give numbers from 0 to {count - 1} that rise"
        )
    return with_layers(config, range(layers[-1] + 1))


def keep_layers(module: PreTrainedModel, layers: Sequence[int], name: str) -> None:
    """Drop all layers but these. Raises ModelRefused unless the layers are stored as in Llama."""
    body: Any = getattr(module, "model", None)
    if not isinstance(getattr(body, "layers", None), nn.ModuleList):
        raise ModelRefused(
            f"{name} does not store its layers as Llama does: choose another drafting method"
        )
    body.layers = nn.ModuleList(body.layers[layer] for layer in layers)
    for index, layer in enumerate(body.layers):
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = index
    body.config = module.config = with_layers(module.config, layers)


def with_layers(config: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
    """Return a copy of the configuration that describes only these layers."""
    found = copy.deepcopy(config)
    text: Any = found.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        text.layer_types = [kinds[layer] for layer in layers]
    text.num_hidden_layers = len(layers)
    return found


def every_second_layer(config: PreTrainedConfig) -> list[int]:
    """Return the default choice, if `outrider tune layers` found nothing better."""
    return list(range(0, config.get_text_config(decoder=True).num_hidden_layers, 2))


def float32_sample(module: PreTrainedModel) -> PreTrainedModel:
    """Return a small float32 copy of a model that stores its layers as Llama does.

    It has the first SAMPLE_LAYERS layers and one of each other type, and SAMPLE_TOKENS tokens at
    most. Code that computes the same on it in float32 computes the same model in 16 bits, where
    rounding hides small faults: rounding alone moves the logits of some models by a third.
    """
    config = module.config
    kinds: list[str] = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    kept = sorted(
        {*range(min(SAMPLE_LAYERS, len(kinds))), *(kinds.index(kind) for kind in set(kinds))}
    )
    smaller: Any = with_layers(config, kept)
    smaller.vocab_size = min(config.vocab_size, SAMPLE_TOKENS)
    smaller.pad_token_id = None
    sample = type(module)(smaller)
    weights = module.state_dict()
    values = {}
    for name, own in sample.state_dict().items():
        parts = name.split(".")
        if "layers" in parts:
            place = parts.index("layers") + 1
            parts[place] = str(kept[int(parts[place])])
        values[name] = weights[".".join(parts)][: len(own)].to(torch.float32)
    sample.load_state_dict(values)
    return sample.to(module.device).eval()
