"""A tiny target to train for, and what there is to learn from."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.core.sampling_params import SamplingParams
from training import outputs, text
from training.run import TrainingData, TrainingJob
from training.teacher import Teacher

CONTEXT = 24


def rows(seed: int = 0, batch: int = 2, context: int = CONTEXT) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(1, 4096, (batch, context)))


def documents(count: int, length: int = 400) -> list[text.Document]:
    return [
        text.Document(f"{index}.txt", f"text {index} " * (length // 8)) for index in range(count)
    ]


def corpus(teacher: Teacher) -> text.Corpus:
    return text.build_corpus(documents(4, 800), teacher.tokenizer.backend_tokenizer, 0, 2 * CONTEXT)


def written(teacher: Teacher, seed: int = 0) -> list[outputs.TargetText]:
    """Texts that the target has not written: any will do for a loop."""
    made = rows(seed, batch=2).tolist()
    return [
        outputs.TargetText(tuple(row[:6]), tuple(row[6:]), SamplingParams(temperature=t, seed=1))
        for row in made
        for t in (0.0, 0.8)
    ]


def order(
    out: Path, target: Path, method: str, settings: dict[str, Any], steps: int = 3
) -> TrainingJob:
    return TrainingJob(
        method, str(target), out, settings, steps, batch=2, context=CONTEXT, own=100, seed=0
    )


def material(teacher: Teacher) -> TrainingData:
    return TrainingData(
        teacher, corpus(teacher), rows(9, 4).numpy().astype(np.int32), written(teacher)
    )
