"""A whole training of an EAGLE or block drafter: features, training, acceptance, folder."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

import numpy as np
import torch
from torch import Tensor

from runtime.core.errors import InvalidRequest
from runtime.core.messages import Tokens
from runtime.models.base import ModelIdentity
from runtime.models.eagle import Eagle, Layer, write_eagle
from runtime.models.head_checkpoint import target_identity
from training import eagle
from training.acceptance import Guess, HeldOutAcceptance, measure_acceptance
from training.card import acceptance_table
from training.features import Features, open_features
from training.folder import FINISHED
from training.loop import Loss, TrainingSettings, train
from training.outputs import TargetText
from training.progress import ProgressBar
from training.run import CHECKPOINT, TrainingJob, publish_result
from training.teacher import Teacher
from training.text import Corpus

FEATURES = "features"
HELD_OUT_PROMPTS = 24  # of a file of prompts
SHOWN_STEPS = 4  # positions ahead whose acceptance is measured
MATRIX_RATE, OTHER_RATE = 0.02, 3e-3


@dataclass(frozen=True, slots=True)
class EagleData:
    """texts     the texts to learn from, as tokens
    held_out  the target's answers to prompts that are not among them, by a title
    """

    teacher: Teacher
    texts: Sequence[Tokens]
    held_out: Mapping[str, Sequence[TargetText]]
    digest: str


@dataclass(frozen=True, slots=True)
class LayerMethod(Generic[Layer]):
    """What differs between the methods whose drafter is a draft layer.

    new    makes an untrained module that guesses the given tokens
    loss   of a module on known features, whose states are divided by the given sizes
    guess  makes a Guess of a module; row p of position i guesses token p + LOOK_AHEAD + i
    write  writes a checkpoint
    """

    new: Callable[[Tensor], Layer]
    loss: Callable[[Layer, Features, Tensor], Loss]
    guess: Callable[[Layer], Guess]
    write: Callable[[Path, Layer, ModelIdentity], None]


def train_eagle(
    order: TrainingJob, material: EagleData, work: Path, bar: ProgressBar
) -> dict[str, list[HeldOutAcceptance]]:
    """Train, measure and publish a draft layer at `order.out`; return the acceptance by title."""
    teacher, asked = material.teacher, order.settings
    method = LayerMethod(
        lambda tokens: eagle.new_eagle(
            teacher, asked["layers"], asked["intermediate"], tokens, order.seed
        ),
        lambda module, known, scales: eagle.distillation(
            teacher, module, known, scales, order.context, asked["unroll"]
        ),
        lambda module: eagle.eagle_guesser(teacher, module, SHOWN_STEPS),
        write_eagle,
    )
    return train_layer(order, material, method, work, bar)


def train_layer(
    order: TrainingJob,
    material: EagleData,
    method: LayerMethod[Layer],
    work: Path,
    bar: ProgressBar,
) -> dict[str, list[HeldOutAcceptance]]:
    """Train, measure and publish what `method` makes, as `train_eagle` does."""
    began, teacher, asked = time.monotonic(), material.teacher, order.settings
    tell = bar.counts("reading the texts with the target", len(material.texts))
    known = open_features(teacher, asked["layers"], material.texts, work / FEATURES, tell)
    check_size(known, order)
    module = method.new(eagle.frequent_tokens(known.tokens, asked["draft_vocabulary"]))
    module.to(teacher.model.device)
    scales = eagle.tap_scales(known.taps, len(asked["layers"]))
    losses = train(
        module,
        method.loss(module, known, scales),
        eagle.window_starts(len(known.tokens), order.context, order.batch, order.seed),
        TrainingSettings(order.steps, order.seed, MATRIX_RATE, OTHER_RATE),
        work / CHECKPOINT,
        bar.steps(order.steps),
    )
    eagle.scale_taps(module, scales)
    identity = target_identity(teacher.module.config, teacher.tokenizer)
    method.write(work / FINISHED, module, identity)
    module.to(torch.bfloat16).float()  # measured as it was saved
    guess = method.guess(module)
    measured = {
        title: measure_acceptance(texts, guess, eagle.LOOK_AHEAD)
        for title, texts in material.held_out.items()
    }
    first, *others = measured
    answers = [
        token for texts in material.held_out.values() for one in texts for token in one.output
    ]
    corpus = Corpus(
        known.tokens.int().numpy(),
        np.array(answers, dtype=np.int32),
        len(material.texts),
        material.digest,
    )
    publish_result(
        order,
        corpus,
        losses,
        time.monotonic() - began,
        measured[first],
        work,
        eagle_sections(module, known, {title: measured[title] for title in others}),
    )
    return measured


def data_texts(corpus: Corpus, context: int) -> list[Tokens]:
    """Return the data as texts of `context` tokens."""
    rows = corpus.train[: len(corpus.train) // context * context].reshape(-1, context)
    return [tuple(row) for row in rows.tolist()]


def check_size(known: Features, order: TrainingJob) -> None:
    if len(known.tokens) < 2 * order.context:
        raise InvalidRequest(
            f"{len(known.tokens)} tokens to learn from: at least {2 * order.context} are needed, "
            "raise --own or give --data",
            "own",
        )


def eagle_sections(
    module: Eagle, known: Features, measured: Mapping[str, Sequence[HeldOutAcceptance]]
) -> str:
    """Return the card's sections on further held-out prompts and on the draft vocabulary."""
    covered = torch.isin(known.tokens, module.draft_tokens.cpu()).float().mean()
    sections = [
        f"## Acceptance: {title}\n\n{acceptance_table(at)}\n" for title, at in measured.items()
    ]
    sections.append(
        f"## Draft vocabulary\n\n{len(module.draft_tokens)} tokens, which are "
        f"{100 * float(covered):.1f} % of the training texts.\n"
    )
    return "\n" + "\n".join(sections)
