"""A model of some of another one's layers, with its embedding and unembedding: what self-speculation drafts with."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from runtime.core.errors import ModelRefused


def truncated_config(
    config: PreTrainedConfig, layers: Sequence[int], name: str
) -> PreTrainedConfig:
    """`config` without the layers behind the last of `layers`. Raises ModelRefused where these are not layers of it, in their order."""
    count: int = config.get_text_config(decoder=True).num_hidden_layers
    if (
        not layers
        or list(layers) != sorted(set(layers))
        or not 0 <= layers[0] <= layers[-1] < count
    ):
        raise ModelRefused(
            f"layers {str(list(layers))[:48]} are not some of the {count} of {name}: give numbers from 0 to {count - 1} that rise"
        )
    return with_layers(config, range(layers[-1] + 1))


def keep_layers(module: PreTrainedModel, layers: Sequence[int], name: str) -> None:
    """Let go of all layers but these. Raises ModelRefused where they do not lie where Llama's do."""
    body: Any = getattr(module, "model", None)
    if not isinstance(getattr(body, "layers", None), nn.ModuleList):
        raise ModelRefused(
            f"{name} has its layers in another place than Llama: choose another drafting method"
        )
    body.layers = nn.ModuleList(body.layers[layer] for layer in layers)
    for index, layer in enumerate(body.layers):
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = index
    body.config = module.config = with_layers(module.config, layers)


def with_layers(config: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
    """A copy that tells of these layers alone."""
    found = copy.deepcopy(config)
    text: Any = found.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        text.layer_types = [kinds[layer] for layer in layers]
    text.num_hidden_layers = len(layers)
    return found


def every_second_layer(config: PreTrainedConfig) -> list[int]:
    """What is kept where nobody has looked for something better (`outrider tune layers`)."""
    return list(range(0, config.get_text_config(decoder=True).num_hidden_layers, 2))
