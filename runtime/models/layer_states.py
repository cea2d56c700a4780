"""Shows the hidden states between the decoder layers of a model, as bits of bfloat16 numbers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from runtime.core.features import FeatureBits, LayerFeatures


def check_layers(layers: Sequence[int], count: int) -> None:
    """Raise LookupError unless these are rising numbers from 0 to `count`, the number of layers."""
    if list(layers) != sorted(set(layers)) or not all(0 <= layer <= count for layer in layers):
        raise LookupError(f"features of layers {list(layers)} of a model with {count} layers")


def decoder_layers(module: PreTrainedModel) -> Sequence[nn.Module]:
    """Return the decoder layers in order. Raises LookupError if they are not found."""
    count = module.config.get_text_config(decoder=True).num_hidden_layers
    for child in module.modules():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return list(child)
    raise LookupError(f"no list of {count} decoder layers in it")


@contextmanager
def recorded(module: PreTrainedModel, layers: Sequence[int]) -> Iterator[list[list[torch.Tensor]]]:
    """Record the inputs (rows, d) of these layers in each pass inside the block, by layer.

    The number of layers stands for the output of the last one.
    """
    modules = decoder_layers(module)
    found: list[list[torch.Tensor]] = [[] for _ in layers]
    hooks: list[Any] = []

    def before(pieces: list[torch.Tensor]) -> Any:
        return lambda _, args, kwargs: pieces.append(
            to_bfloat16(args[0] if args else kwargs["hidden_states"])
        )

    def after(pieces: list[torch.Tensor]) -> Any:
        return lambda _, args, output: pieces.append(
            to_bfloat16(output[0] if isinstance(output, tuple) else output)
        )

    try:
        for layer, pieces in zip(layers, found, strict=True):
            hooks.append(
                modules[-1].register_forward_hook(after(pieces))
                if layer == len(modules)
                else modules[layer].register_forward_pre_hook(before(pieces), with_kwargs=True)
            )
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def to_bfloat16(states: torch.Tensor) -> torch.Tensor:
    """Return a copy (rows, d) of the states (1, rows, d) of a pass: layers may change them."""
    return states.flatten(0, 1).to(torch.bfloat16, copy=True)


def split_features(
    layers: tuple[int, ...], states: Sequence[torch.Tensor], counts: Sequence[int]
) -> list[LayerFeatures | None]:
    """Return the features of each part, from bfloat16 states (rows, d) by layer.

    counts  number of rows of each part; further rows are padding

    Without layers there are none.
    """
    if not layers:
        return [None] * len(counts)
    bits = feature_bits(torch.cat([rows[: sum(counts)] for rows in states], dim=-1))
    return [LayerFeatures(layers, rows) for rows in np.split(bits, np.cumsum(counts)[:-1].tolist())]


def feature_bits(states: torch.Tensor) -> FeatureBits:
    """Return bfloat16 states as bits, on the host."""
    bits: FeatureBits = states.view(torch.int16).cpu().numpy().view(np.uint16)
    return bits
