"""Training of draft models: a small language model distilled from a target, on the target's own
texts and on the data."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from runtime.models.loader import read_config, read_weights
from runtime.models.model_folder import find_folder
from training import losses
from training.folder import write_atomically
from training.loop import Loss, TrainingSettings, low_precision
from training.loss_kind import LossKind
from training.shapes import DraftShape, Measure, Times, propose_shape
from training.teacher import Teacher

DISTANCES = {
    LossKind.kl: losses.forward_kl,
    LossKind.tvd: losses.tvd,
    LossKind.tvd_plus_plus: losses.tvd_plus_plus,
}
# share of the steps for which tvd and tvd++ use KL: their initial gradient is almost zero, and they
# narrow the draft's distribution
KL_SHARE = 0.8
CONTINUED_RATE_FACTOR = 0.1  # learning rate factor for a pretrained draft
PROPOSAL_FILE = "shape.json"


def draft_settings(steps: int, seed: int, fresh: bool) -> TrainingSettings:
    usual = TrainingSettings(steps, seed, decay=0.05)
    return (
        usual
        if fresh
        else replace(
            usual,
            matrix_rate=CONTINUED_RATE_FACTOR * usual.matrix_rate,
            other_rate=CONTINUED_RATE_FACTOR * usual.other_rate,
        )
    )


def new_draft(shape: DraftShape, teacher: Teacher, seed: int) -> PreTrainedModel:
    """Create a randomly initialised draft with the target's vocabulary and context."""
    torch.manual_seed(seed)
    config = shape.config(
        teacher.model.vocabulary, teacher.model.context, teacher.tokenizer.eos_token_id
    )
    return LlamaForCausalLM(config).to(teacher.model.device)


def load_start(start: str, device: torch.device) -> PreTrainedModel:
    """Load a model to continue training from, in float32. Raises ModelRefused."""
    folder = find_folder(start)
    module: PreTrainedModel = read_weights(
        folder, start, read_config(folder, start), torch.float32, device
    )
    return module


def distillation(teacher: Teacher, draft: PreTrainedModel, goal: LossKind) -> Loss:
    """Return the loss towards `goal`; tvd and tvd++ begin with forward KL.

    Token ids for which one of the two models has no logit are ignored.
    """

    def loss(rows: Tensor, done: float) -> Tensor:
        rows = rows.to(teacher.model.device)
        with low_precision(rows.device):
            guess = draft(input_ids=rows, use_cache=False).logits.float()
        if goal is LossKind.next_token:
            return losses.next_token(guess[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        with torch.no_grad(), low_precision(rows.device):
            truth = teacher.module(rows, use_cache=False).logits.float()
        most = min(guess.shape[-1], truth.shape[-1])
        distance = DISTANCES[LossKind.kl if done < KL_SHARE else goal]
        return distance(guess[..., :most].flatten(0, 1), truth[..., :most].flatten(0, 1))

    return loss


def draft_guesser(draft: PreTrainedModel) -> Callable[[Sequence[int], int], Tensor]:
    """Return a function from a text and a first row to logits (1, rows, vocabulary) on the CPU."""

    def guess(text: Sequence[int], first: int) -> Tensor:
        with torch.no_grad():
            logits: Tensor = draft(
                input_ids=torch.tensor([text], device=draft.device), use_cache=False
            ).logits
        return logits[:, first:].float().cpu()

    return guess


def settle_shape(
    work: Path, budget: float, vocabulary: int, measure: Measure
) -> tuple[DraftShape, dict[DraftShape, Times]]:
    """Return the proposed shape and its measurements.

    The measurement is stored, so that a resumed training uses the same shape.
    """
    file = work / PROPOSAL_FILE
    if not file.exists():
        shape, curve = propose_shape(budget, vocabulary, measure)
        rows = [
            [of.hidden, of.layers, {str(rows): seconds for rows, seconds in times.items()}]
            for of, times in curve.items()
        ]
        write_atomically(
            file, json.dumps({"shape": [shape.hidden, shape.layers], "curve": rows}).encode()
        )
    found: dict[str, Any] = json.loads(file.read_bytes())
    curve = {
        DraftShape(hidden, layers): {int(rows): s for rows, s in times.items()}
        for hidden, layers, times in found["curve"]
    }
    return DraftShape(*found["shape"]), curve


def save_draft(draft: PreTrainedModel, teacher: Teacher, folder: Path) -> None:
    """Save a Hugging Face folder with the target's tokenizer.

    The weights are bfloat16; those of `draft` are rounded to bfloat16 too.
    """
    draft.to(torch.bfloat16).save_pretrained(folder)
    draft.float()
    teacher.tokenizer.save_pretrained(folder)
