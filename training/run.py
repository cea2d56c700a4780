"""The common part of every training: its job, its data, and how its result becomes a folder."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn
from transformers import PreTrainedModel

from runtime.core.errors import InvalidRequest
from runtime.models.head_checkpoint import target_identity, write_checkpoint
from training import draft, text
from training.acceptance import HeldOutAcceptance, measure_acceptance
from training.card import render_card, shapes_table
from training.folder import FINISHED, publish, write_atomically
from training.heads import HEAD_OFFSET, Forward, distillation, head_guesser
from training.loop import Batches, Loss, StepCallback, TrainingSettings, train
from training.loss_kind import LossKind
from training.outputs import TargetText
from training.shapes import DraftShape, Times
from training.teacher import Teacher

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """The requested training of any method.

    batch, context  texts per step, and tokens per text
    own             tokens that the target itself writes for training, half of each batch;
                    0: only the data
    """

    method: str
    target: str
    out: Path
    settings: dict[str, Any]
    steps: int
    batch: int
    context: int
    own: int
    seed: int

    def recipe(self, fingerprint: str, digest: str) -> dict[str, Any]:
        """Return everything that determines the result.

        `fingerprint` identifies the target's files, `digest` the data.
        """
        asked = {key: value for key, value in asdict(self).items() if key not in ("out", "target")}
        return {**asked, "target": fingerprint, "data": digest}


@dataclass(frozen=True, slots=True)
class TrainingData:
    """The data of a training: `own` are the target's texts (n, context), `held_out` its answers to
    held-out prompts."""

    teacher: Teacher
    corpus: text.Corpus
    own: npt.NDArray[np.int32]
    held_out: Sequence[TargetText]

    def batches(self, order: TrainingJob) -> Batches:
        sources = [text.windows(self.corpus.train, order.context, order.seed)]
        if len(self.own):
            sources.append(text.text_rows(self.own, order.seed))
        return text.make_batches(sources, order.batch)


def check_context(wanted: int, model: int) -> int:
    """Return the context. Raises InvalidRequest if it is too short to split, or exceeds the
    model's."""
    if not 16 <= wanted <= model:
        raise InvalidRequest(
            f"context {wanted} is not allowed: this target reads 16 to {model} tokens", "context"
        )
    return wanted


def run_training(
    order: TrainingJob,
    material: TrainingData,
    module: nn.Module,
    loss: Loss,
    settings: TrainingSettings,
    work: Path,
    tell: StepCallback,
) -> tuple[list[float], float]:
    """Train `module`; return the losses and the seconds of this run."""
    began = time.monotonic()
    losses = train(module, loss, material.batches(order), settings, work / CHECKPOINT, tell)
    return losses, time.monotonic() - began


def train_head(
    order: TrainingJob,
    material: TrainingData,
    head: nn.Module,
    forward: Forward,
    work: Path,
    tell: StepCallback,
    offset: int = HEAD_OFFSET,
    settings: TrainingSettings | None = None,
) -> list[HeldOutAcceptance]:
    """Train, measure and publish a head at `order.out`.

    `offset` is that of training.heads; `settings` default to the usual ones.
    """
    teacher, how = material.teacher, settings or TrainingSettings(order.steps, order.seed)
    head.to(teacher.model.device)
    losses, seconds = run_training(
        order, material, head, distillation(teacher, forward, offset), how, work, tell
    )
    measured = measure_acceptance(material.held_out, head_guesser(teacher, forward), offset)
    identity = target_identity(teacher.module.config, teacher.tokenizer)
    write_checkpoint(
        work / FINISHED, order.method, identity, order.settings, dict(head.state_dict())
    )
    publish_result(order, material.corpus, losses, seconds, measured, work)
    return measured


def train_draft(
    order: TrainingJob,
    material: TrainingData,
    module: PreTrainedModel,
    goal: LossKind,
    curve: dict[DraftShape, Times],
    work: Path,
    tell: StepCallback,
) -> list[HeldOutAcceptance]:
    """Train, measure and publish a draft model. `curve` is the measurement that chose its shape."""
    teacher = material.teacher
    settings = draft.draft_settings(order.steps, order.seed, fresh=not order.settings.get("start"))
    losses, seconds = run_training(
        order, material, module, draft.distillation(teacher, module, goal), settings, work, tell
    )
    draft.save_draft(module, teacher, work / FINISHED)
    measured = measure_acceptance(
        material.held_out, draft.draft_guesser(module), offset=1
    )  # of the weights as saved
    publish_result(
        order,
        material.corpus,
        losses,
        seconds,
        measured,
        work,
        shapes_table(curve, teacher.model.vocabulary),
    )
    return measured


def publish_result(
    order: TrainingJob,
    corpus: text.Corpus,
    losses: list[float],
    seconds: float,
    measured: Sequence[HeldOutAcceptance],
    work: Path,
    more: str = "",
) -> None:
    """Write the card and the figures as JSON, and rename the folder to its final name."""
    about = render_card(
        order.method, order.target, asdict(order), corpus, losses, seconds, measured
    )
    write_atomically(work / FINISHED / "README.md", (about + more).encode())
    figures = {
        "losses": [round(loss, 5) for loss in losses],
        "acceptance": [at.as_json() for at in measured],
        "seconds": round(seconds, 1),
    }
    write_atomically(work / FINISHED / "training.json", json.dumps(figures).encode())
    publish(work, order.out)
