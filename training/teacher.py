"""The frozen target as training sees it: hidden states of whole texts, and what its unembedding makes of any such state."""

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
from runtime.models.loader import find_folder, load_model, load_tokenizer

FINGERPRINT_BYTES = 1 << 20  # bytes of a weight file that are looked at on either side


@dataclass(frozen=True, slots=True)
class States:
    """Of a batch of texts.

    layers  what goes into each layer, from layer 0 on: (batch, context, hidden) each
    last    after the final norm: what the unembedding gets
    cache   transformers' cache with the keys and values of all layers
    """

    layers: tuple[Tensor, ...]
    last: Tensor
    cache: Any


class Teacher:
    """No parameter of it is ever changed.

    Raises ModelRefused for a model whose logits are not its unembedding of its last hidden state: no head could be trained on that.
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
                f"model {model.name} does not show its hidden states ({misfit}): choose another target"
            ) from misfit
        if not error <= ROUNDING_TOLERANCE[model.dtype == torch.float32]:
            raise ModelRefused(
                f"model {model.name} changes its logits after the unembedding: choose a target that does not"
            )

    def states(self, rows: Tensor) -> States:
        """Of token ids (batch, context), on the model's device, without gradients."""
        with torch.no_grad():
            found = self.module(rows, use_cache=True, output_hidden_states=True, logits_to_keep=1)
        return States(
            tuple(found.hidden_states[:-1]), found.hidden_states[-1], found.past_key_values
        )

    def unembed(self, states: Tensor) -> Tensor:
        """Logits in float32 (..., vocabulary) of states after the final norm; gradients go through to the states."""
        logits: Tensor = self.module.get_output_embeddings()(states.to(self.model.dtype)).float()
        return logits


def load_teacher(target: str, device: str = "auto") -> Teacher:
    """In float32 on a CPU, in the checkpoint's own type on a GPU. Raises ModelRefused."""
    return Teacher(load_model(target, "auto", device, step="generic"), load_tokenizer(target))


def fingerprint(target: str) -> str:
    """A hash that other weights, or another tokenizer, would not have. Of a weight file it sees length and ends: a model may be large."""
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
