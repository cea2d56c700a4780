"""The training of what ships besides the pair, on the draft's data: models/heads and models/s3d."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.progress import track
from torch import nn

from runtime.heads.hidden_transfer import HiddenTransfer
from runtime.heads.medusa import Medusa
from runtime.models.acceptance import continuation
from runtime.models.loader import load_model
from training import hidden_transfer, medusa, outputs, s3d, stdlib_corpus, text
from training.folder import open_work
from training.heads import DRAFT_OFFSET, HEAD_OFFSET, Forward
from training.progress import ProgressBar
from training.run import TrainingData, TrainingJob, train_head
from training.shipped.pair_shapes import MODELS
from training.teacher import Teacher, fingerprint, load_teacher

CONTEXT = 256
HEADS_FOLDER = MODELS / "heads"
KEPT_LAYERS, MASKS, RANK = (
    [0, 1, 6],
    3,
    16,
)  # of S3D; `outrider tune layers` finds these three layers


def job_of(method: str) -> TrainingJob:
    target = str(MODELS / "target")
    if method == "medusa":
        return TrainingJob(
            method,
            target,
            HEADS_FOLDER / method,
            {"heads": 3, "blocks": 1},
            steps=900,
            batch=4,
            context=CONTEXT,
            own=0,
            seed=0,
        )
    if method == "hidden-transfer":
        return TrainingJob(
            method,
            target,
            HEADS_FOLDER / method,
            {"layers": [3, 4, 5]},
            steps=560,
            batch=2,
            context=CONTEXT,
            own=0,
            seed=0,
        )
    settings = {"layers": KEPT_LAYERS, "masks": MASKS, "rank": RANK}
    return TrainingJob(
        method,
        target,
        MODELS / method,
        settings,
        steps=1000,
        batch=2,
        context=CONTEXT,
        own=0,
        seed=0,
    )


def build(method: str, teacher: Teacher) -> tuple[nn.Module, Forward, int]:
    """Return the module to train, its forward pass, and the offset of its first guessed
    position."""
    settings = job_of(method).settings
    if method == "medusa":
        heads = Medusa(teacher.hidden_size, settings["heads"], settings["blocks"])
        return heads, medusa.make_forward(heads), HEAD_OFFSET
    if method == "hidden-transfer":
        maps = HiddenTransfer(teacher.hidden_size, settings["layers"])
        return maps, hidden_transfer.make_forward(maps, teacher), HEAD_OFFSET
    made = s3d.new_s3d(teacher, **settings, seed=0)
    return made, s3d.make_forward(made, teacher, settings["layers"]), DRAFT_OFFSET


def train_pair_head(method: str, own: Path) -> None:
    """Train one head; `own` is the folder with the target's texts that the stage `outputs`
    wrote."""
    rows = np.concatenate([np.load(file) for file in sorted(own.glob("*.npy"))]).astype(np.int32)
    asked = replace(job_of(method), own=rows.size)
    teacher = load_teacher(asked.target, "cpu")
    names = sorted(
        [*stdlib_corpus.library_files(held_out=False), *stdlib_corpus.library_files(held_out=True)]
    )
    documents = [text.Document(name, stdlib_corpus.read_source(name)) for name in names]
    data = text.build_corpus(
        documents, teacher.tokenizer.backend_tokenizer, teacher.tokenizer.eos_token_id, 2 * CONTEXT
    )
    with (
        open_work(asked.out, asked.recipe(fingerprint(asked.target), data.digest)) as work,
        ProgressBar() as bar,
    ):
        module, forward, offset = build(method, teacher)
        material = TrainingData(
            teacher, data, rows, held_out_texts(asked.target, data, own.parent / "held-out")
        )
        settings = s3d.s3d_settings(asked.steps, asked.seed) if method == "s3d" else None
        train_head(asked, material, module, forward, work, bar.steps(asked.steps), offset, settings)


def held_out_texts(target: str, data: text.Corpus, folder: Path) -> list[outputs.TargetText]:
    """Return the target's answers to held-out prompts; they are written once, under `folder`."""
    requests = outputs.held_out_requests(data, CONTEXT, seed=0)
    place = folder / outputs.folder_name(fingerprint(target), requests)
    if left := outputs.count_missing(place, requests):
        quick = load_model(target, "float32", "cpu")
        for number, group in track(
            list(enumerate(outputs.groups_of(requests))),
            description=f"{left} texts to be measured on",
        ):
            if not outputs.has_answers(place, number):
                outputs.save_answers(
                    place,
                    number,
                    [
                        continuation(quick, asked.prompt, asked.sampling, frozenset())
                        for asked in group
                    ],
                )
    return outputs.read_answers(place, requests)
