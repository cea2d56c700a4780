"""Reads a model's token embeddings and its unembedding, and none of its other weights."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from runtime.core.errors import ModelRefused
from runtime.models.hf import MODEL_ERRORS
from runtime.models.loader import (
    INDEX_FILE,
    check_weights,
    read_config,
    read_json,
)
from runtime.models.model_folder import find_folder
from runtime.models.quiet import one_line


def read_embeddings(name_or_folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the embeddings and the unembedding of a model, (vocabulary, d), in their stored type.

    They are one tensor if the model ties them. Raises ModelRefused as `load_model` does, and for a
    model whose weights lack them.
    """
    folder = find_folder(name_or_folder)
    config = read_config(folder, name_or_folder)
    check_weights(folder, name_or_folder)
    given, taken = weight_names(config, name_or_folder)
    embedding = read_tensor(folder, name_or_folder, given)
    if given == taken:
        return embedding, embedding
    return embedding, read_tensor(folder, name_or_folder, taken)


def weight_names(config: PreTrainedConfig, name: str) -> tuple[str, str]:
    """Return the names of the two weights; they are the same if the model ties them."""
    try:
        with torch.device("meta"):
            module: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        names = {id(parameter): key for key, parameter in module.named_parameters()}
        pair: list[nn.Module] = [module.get_input_embeddings(), module.get_output_embeddings()]
        given, taken = (names[id(layer.weight)] for layer in pair)
    except MODEL_ERRORS as error:
        raise ModelRefused(
            f"model {name} has no table of embeddings and unembeddings ({one_line(error)}): "
            "choose another drafting method"
        ) from error
    return given, given if config.get_text_config(decoder=True).tie_word_embeddings else taken


def read_tensor(folder: Path, name: str, key: str) -> torch.Tensor:
    """Read one tensor of a checked folder, from whichever shard holds it."""
    index, file = folder / INDEX_FILE, "model.safetensors"
    if index.is_file():
        file = read_json(index, name)["weight_map"].get(key, "")
    try:
        with safe_open(folder / file, framework="pt") as weights:
            found: torch.Tensor = weights.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ModelRefused(f"{name} lacks the weight {key}: copy it again") from error
    return found
