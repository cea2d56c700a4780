"""The frozen target as seen by training: hidden states of whole texts, and their logits."""

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from runtime.core.errors import ModelRefused
from runtime.models.hf import (
    MODEL_ERRORS,
    PROBE_TOKENS,
    ROUNDING_TOLERANCE,
    HFModel,
    relative_error,
)
from runtime.models.loader import load_model, load_tokenizer
from runtime.models.model_folder import find_folder
from training.loop import cpu_multiplies_bfloat16

FINGERPRINT_BYTES = 1 << 20  # bytes read at either end of a weight file


@dataclass(frozen=True, slots=True)
class States:
    """The states of a batch of texts.

    layers  the input of each layer, from layer 0 on: (batch, context, hidden) each
    last    the states after the final norm, which are the input of the unembedding
    cache   transformers' cache with the keys and values of all layers
    """

    layers: tuple[Tensor, ...]
    last: Tensor
    cache: Any


class Teacher:
    """A target whose parameters never change.

    Raises ModelRefused if the logits are not the unembedding of the last hidden state, because no
    head could be trained on such a model.
    """

    def __init__(self, model: HFModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.module: Any = model.module.requires_grad_(False).eval()
        self.hidden_size = int(self.module.config.get_text_config(decoder=True).hidden_size)
        probe = torch.tensor([PROBE_TOKENS], device=model.device)
        try:
            with torch.no_grad():
                logits = self.module(probe, use_cache=False).logits[0].float()
                error = relative_error(self.unembed(self.states(probe).last[0]), logits)
        except MODEL_ERRORS as misfit:
            raise ModelRefused(
                f"model {model.name} does not show its hidden states ({misfit}): choose "
                "another target"
            ) from misfit
        if not error <= ROUNDING_TOLERANCE[model.dtype == torch.float32]:
            raise ModelRefused(
                f"model {model.name} changes its logits after the unembedding: choose "
                "another target"
            )

    def states(self, rows: Tensor) -> States:
        """Return the states of token ids (batch, context) on the model's device, without
        gradients."""
        with torch.no_grad():
            found = self.module(rows, use_cache=True, output_hidden_states=True, logits_to_keep=1)
        return States(
            tuple(found.hidden_states[:-1]), found.hidden_states[-1], found.past_key_values
        )

    def unembed(self, states: Tensor) -> Tensor:
        """Return float32 logits (..., vocabulary) of states after the final norm; gradients flow to
        the states."""
        logits: Tensor = self.module.get_output_embeddings()(states.to(self.model.dtype)).float()
        return logits


def load_teacher(target: str, device: str = "auto") -> Teacher:
    """Load the target in float32 on a CPU, or in the checkpoint's own type on a GPU. Raises
    ModelRefused."""
    return Teacher(load_model(target, "auto", device, step="generic"), load_tokenizer(target))


def fast_copy(teacher: Teacher) -> Any:
    """Return the target's module, in bfloat16 on a CPU that multiplies it natively."""
    if teacher.model.device.type == "cpu" and cpu_multiplies_bfloat16():
        return copy.deepcopy(teacher.module).to(torch.bfloat16)
    return teacher.module


def fingerprint(target: str) -> str:
    """Return a hash that changes with the weights or the tokenizer.

    Of a weight file it reads only the length and both ends, because a model may be large.
    """
    found = hashlib.sha256()
    for file in sorted(find_folder(target).iterdir(), key=lambda file: file.name):
        if file.name in ("config.json", "tokenizer.json") or file.suffix == ".safetensors":
            found.update(f"{file.name} {file.stat().st_size} ".encode() + file_ends(file))
    return found.hexdigest()


def file_ends(file: Path) -> bytes:
    with file.open("rb") as stream:
        first = stream.read(FINGERPRINT_BYTES)
        stream.seek(max(0, file.stat().st_size - FINGERPRINT_BYTES))
        return first + stream.read()
