"""Draft models: a small language model drawn towards a target, on the target's own texts and on the data."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from runtime.models.loader import find_folder, read_config, read_weights
from training import losses
from training.folder import write
from training.goal import Goal
from training.loop import Loss, Settings, low_precision
from training.shapes import Measure, Shape, Times, propose
from training.teacher import Teacher

DISTANCES = {
    Goal.kl: losses.forward_kl,
    Goal.tvd: losses.tvd,
    Goal.tvd_plus_plus: losses.tvd_plus_plus,
}
WARM = 0.8  # share of the steps in which tvd and tvd++ follow KL: at first their gradient is almost nothing, and they narrow a draft down
GENTLE = 0.1  # of the learning rates, for a draft that knows something already
PROPOSAL = "shape.json"


def settings(steps: int, seed: int, fresh: bool) -> Settings:
    usual = Settings(steps, seed, decay=0.05)
    return (
        usual
        if fresh
        else replace(
            usual, matrix_rate=GENTLE * usual.matrix_rate, other_rate=GENTLE * usual.other_rate
        )
    )


def new(shape: Shape, teacher: Teacher, seed: int) -> PreTrainedModel:
    """Of random weights, with the target's vocabulary and context."""
    torch.manual_seed(seed)
    config = shape.config(
        teacher.model.vocabulary, teacher.model.context, teacher.tokenizer.eos_token_id
    )
    return LlamaForCausalLM(config).to(teacher.model.device)


def started(start: str, device: torch.device) -> PreTrainedModel:
    """A model to go on from, in float32. Raises ModelRefused."""
    folder = find_folder(start)
    module: PreTrainedModel = read_weights(
        folder, start, read_config(folder, start), torch.float32, device
    )
    return module


def distillation(teacher: Teacher, draft: PreTrainedModel, goal: Goal) -> Loss:
    """Towards `goal`; tvd and tvd++ begin with forward KL. Token ids that one of the two has no logit for are left out."""

    def loss(rows: Tensor, done: float) -> Tensor:
        rows = rows.to(teacher.model.device)
        with low_precision(rows.device):
            guess = draft(input_ids=rows, use_cache=False).logits.float()
        if goal is Goal.next_token:
            return losses.next_token(guess[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        with torch.no_grad(), low_precision(rows.device):
            truth = teacher.module(rows, use_cache=False).logits.float()
        most = min(guess.shape[-1], truth.shape[-1])
        distance = DISTANCES[Goal.kl if done < WARM else goal]
        return distance(guess[..., :most].flatten(0, 1), truth[..., :most].flatten(0, 1))

    return loss


def guesser(draft: PreTrainedModel) -> Callable[[Sequence[int]], Tensor]:
    """Logits (1, context, vocabulary) of a text, on the CPU."""

    def guess(text: Sequence[int]) -> Tensor:
        with torch.no_grad():
            logits: Tensor = draft(
                input_ids=torch.tensor([text], device=draft.device), use_cache=False
            ).logits
        return logits.float().cpu()

    return guess


def settled(
    work: Path, budget: float, vocabulary: int, measure: Measure
) -> tuple[Shape, dict[Shape, Times]]:
    """The proposed shape and what was measured for it: measured once, so that an interrupted training goes on with the same."""
    file = work / PROPOSAL
    if not file.exists():
        shape, curve = propose(budget, vocabulary, measure)
        rows = [
            [of.hidden, of.layers, {str(rows): seconds for rows, seconds in times.items()}]
            for of, times in curve.items()
        ]
        write(file, json.dumps({"shape": [shape.hidden, shape.layers], "curve": rows}).encode())
    found: dict[str, Any] = json.loads(file.read_bytes())
    curve = {
        Shape(hidden, layers): {int(rows): s for rows, s in times.items()}
        for hidden, layers, times in found["curve"]
    }
    return Shape(*found["shape"]), curve


def save(draft: PreTrainedModel, teacher: Teacher, folder: Path) -> None:
    """A Hugging Face folder with the target's tokenizer; weights in bfloat16, to which those of `draft` are rounded too."""
    draft.to(torch.bfloat16).save_pretrained(folder)
    draft.float()
    teacher.tokenizer.save_pretrained(folder)
