"""What every training has in common: what it is given to learn from, and how its result becomes a folder."""

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
from training.acceptance import Acceptance, measure
from training.card import card, shapes_table
from training.folder import FINISHED, publish, write
from training.goal import Goal
from training.heads import HEAD, Forward, distillation, guesser
from training.loop import Batches, Loss, Settings, Tell, train
from training.outputs import Written
from training.shapes import Shape, Times
from training.teacher import Teacher

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked for, whatever the method.

    batch, context  texts of a step, and tokens of each
    own             so many tokens are written by the target itself to learn from, half of each batch; 0: the data alone
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
        """All that decides the result. `fingerprint` stands for the target's files, `digest` for the data."""
        asked = {key: value for key, value in asdict(self).items() if key not in ("out", "target")}
        return {**asked, "target": fingerprint, "data": digest}


@dataclass(frozen=True, slots=True)
class Material:
    """own: texts of the target (n, context); held_out: its answers to beginnings that it has not seen."""

    teacher: Teacher
    corpus: text.Corpus
    own: npt.NDArray[np.int32]
    held_out: Sequence[Written]

    def batches(self, order: Order) -> Batches:
        sources = [text.windows(self.corpus.train, order.context, order.seed)]
        if len(self.own):
            sources.append(text.texts(self.own, order.seed))
        return text.batches(sources, order.batch)


def fitting_context(wanted: int, model: int) -> int:
    """Raises InvalidRequest for a context that the model has not, or that is too short to be cut into beginning and answer."""
    if not 16 <= wanted <= model:
        raise InvalidRequest(
            f"context {wanted} is not allowed: this target reads 16 to {model} tokens", "context"
        )
    return wanted


def fit(
    order: Order,
    material: Material,
    module: nn.Module,
    loss: Loss,
    settings: Settings,
    work: Path,
    tell: Tell,
) -> tuple[list[float], float]:
    """Train `module`; the losses, and the seconds that this run of it took."""
    began = time.monotonic()
    losses = train(module, loss, material.batches(order), settings, work / CHECKPOINT, tell)
    return losses, time.monotonic() - began


def train_head(
    order: Order,
    material: Material,
    head: nn.Module,
    forward: Forward,
    work: Path,
    tell: Tell,
    offset: int = HEAD,
    settings: Settings | None = None,
) -> list[Acceptance]:
    """Train, measure, and leave the folder of the head at `order.out`. `offset`: as of training.heads; `settings`: the usual ones."""
    teacher, how = material.teacher, settings or Settings(order.steps, order.seed)
    head.to(teacher.model.device)
    losses, seconds = fit(
        order, material, head, distillation(teacher, forward, offset), how, work, tell
    )
    measured = measure(material.held_out, guesser(teacher, forward), offset)
    identity = target_identity(teacher.module.config, teacher.tokenizer)
    write_checkpoint(
        work / FINISHED, order.method, identity, order.settings, dict(head.state_dict())
    )
    leave(order, material, losses, seconds, measured, work)
    return measured


def train_draft(
    order: Order,
    material: Material,
    module: PreTrainedModel,
    goal: Goal,
    curve: dict[Shape, Times],
    work: Path,
    tell: Tell,
) -> list[Acceptance]:
    """As train_head, for a draft model. `curve`: what was measured when its shape was chosen."""
    teacher = material.teacher
    settings = draft.settings(order.steps, order.seed, fresh=not order.settings.get("start"))
    losses, seconds = fit(
        order, material, module, draft.distillation(teacher, module, goal), settings, work, tell
    )
    draft.save(module, teacher, work / FINISHED)
    measured = measure(
        material.held_out, draft.guesser(module), offset=1
    )  # of the weights as they are kept
    leave(
        order,
        material,
        losses,
        seconds,
        measured,
        work,
        shapes_table(curve, teacher.model.vocabulary),
    )
    return measured


def leave(
    order: Order,
    material: Material,
    losses: list[float],
    seconds: float,
    measured: Sequence[Acceptance],
    work: Path,
    more: str = "",
) -> None:
    """The card beside what was learned, and its figures as JSON; then the folder gets its name."""
    about = card(
        order.method, order.target, asdict(order), material.corpus, losses, seconds, measured
    )
    write(work / FINISHED / "README.md", (about + more).encode())
    figures = {
        "losses": [round(loss, 5) for loss in losses],
        "acceptance": [at.as_json() for at in measured],
        "seconds": round(seconds, 1),
    }
    write(work / FINISHED / "training.json", json.dumps(figures).encode())
    publish(work, order.out)
