"""Train the shipped pair: `python -m training.shipped` runs all stages, or those given by name.

    tokenizer   byte-level BPE on the training files
    target      next-token training of the target
    outputs     the target's own continuations of training excerpts
    draft       distillation of the draft on them
    medusa, hidden-transfer    heads on the target, trained on the same texts: models/heads
    s3d         masks and an adapter for some of the target's layers, likewise: models/s3d
    card        acceptance, perplexity, curves: models/README.md

Each stage leaves its result under build/train and resumes after an interruption.
"""

import json
import shutil
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from training import loop, stdlib_corpus, text
from training.folder import write_atomically
from training.losses import forward_kl, next_token
from training.progress import ProgressBar
from training.shipped.pair_card import write_card
from training.shipped.pair_heads import train_pair_head as train_head
from training.shipped.pair_shapes import CONTEXT, DRAFT, MODELS, TARGET, VOCABULARY, PairShape

WORK = MODELS.parent / "build" / "train"
BATCH_TOKENS, DECAY = 8192, 0.05


class TrainingStage(StrEnum):
    tokenizer = "tokenizer"
    target = "target"
    outputs = "outputs"
    draft = "draft"
    medusa = "medusa"
    hidden_transfer = "hidden-transfer"
    s3d = "s3d"
    card = "card"


def train_tokenizer() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[stdlib_corpus.END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(
        (stdlib_corpus.read_source(name) for name in stdlib_corpus.library_files(held_out=False)),
        trainer,
    )
    end = stdlib_corpus.END_OF_TEXT
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        bos_token=end,
        pad_token=end,
        model_max_length=CONTEXT,
    )
    for name in ("target", "draft"):
        wrapped.save_pretrained(MODELS / name)


def load_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODELS / "target" / "tokenizer.json"))


def new_model(shape: PairShape, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    end = load_tokenizer().token_to_id(stdlib_corpus.END_OF_TEXT)
    if end is None:
        raise RuntimeError(
            f"the tokenizer has no {stdlib_corpus.END_OF_TEXT}: run the stage `tokenizer` again"
        )
    return LlamaForCausalLM(shape.config(end))


def training_stream() -> text.Stream:
    cached = WORK / "tokens.npy"
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        np.save(
            cached,
            stdlib_corpus.token_stream(
                load_tokenizer(), stdlib_corpus.library_files(held_out=False)
            ),
        )
    return np.asarray(np.load(cached), dtype=np.int32)


def context_at(step: int, steps: int) -> int:
    """Return half the context for the first three quarters of the steps, then the whole context.

    Attention's share of a step grows with the context.
    """
    return CONTEXT // 2 if step < 0.75 * steps else CONTEXT


def train_model(
    name: str,
    model: LlamaForCausalLM,
    loss: loop.Loss,
    streams: Sequence[text.Stream],
    settings: loop.TrainingSettings,
) -> None:
    """Train on equal parts of all streams; save to models/NAME, with the losses next to the
    checkpoint."""
    folder = WORK / name
    folder.mkdir(parents=True, exist_ok=True)
    by_context = {
        context: text.make_batches(
            [text.windows(stream, context, settings.seed) for stream in streams],
            BATCH_TOKENS // context,
        )
        for context in (CONTEXT // 2, CONTEXT)
    }

    def batches(step: int) -> Tensor:
        return by_context[context_at(step, settings.steps)](step)

    with ProgressBar() as bar:
        losses = loop.train(
            model, loss, batches, settings, folder / "checkpoint.pt", bar.steps(settings.steps)
        )
    entries = [
        {"step": step, "tokens": (step + 1) * BATCH_TOKENS, "loss": round(value, 4)}
        for step, value in enumerate(losses)
    ]
    write_atomically(
        folder / "loss.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries).encode()
    )
    save_model(model, MODELS / name)


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Save a Hugging Face folder with bf16 safetensors."""
    model.to(torch.bfloat16).save_pretrained(folder)


def train_target(steps: int, compiled: bool) -> None:
    model = new_model(TARGET, seed=0)
    forward = torch.compile(model) if compiled else model

    def loss(rows: Tensor, _: float) -> Tensor:
        with loop.low_precision(rows.device):
            logits = forward(rows, use_cache=False).logits
        return next_token(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())

    train_model(
        "target", model, loss, [training_stream()], loop.TrainingSettings(steps, decay=DECAY)
    )


def write_outputs(tokens: int) -> None:
    """Continue training excerpts at several temperatures; the draft will meet such texts when it
    drafts."""
    model = LlamaForCausalLM.from_pretrained(MODELS / "target", dtype=torch.float32)
    stream, generator = training_stream(), np.random.default_rng(1)
    batch, prompt, new = 64, 64, 192
    folder = WORK / "outputs"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    for number in track(range(tokens // (batch * new)), description="outputs"):
        if (folder / f"{number:04}.npy").exists():
            continue
        starts = generator.integers(0, len(stream) - prompt, batch)
        rows = torch.from_numpy(np.stack([stream[s : s + prompt] for s in starts]).astype(np.int64))
        temperature = (0.0, 0.5, 1.0)[number % 3]
        how = (
            {"do_sample": True, "temperature": temperature, "top_k": 0}
            if temperature
            else {"do_sample": False}
        )
        out = model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            min_new_tokens=new,
            max_new_tokens=new,
            **how,
        )
        np.save(folder / f"{number:04}.npy", out.numpy().astype(np.uint16))


def train_draft(steps: int, compiled: bool) -> None:
    """Minimise the forward KL to the target on equal parts of its own outputs and corpus
    windows."""
    teacher = LlamaForCausalLM.from_pretrained(MODELS / "target", dtype=torch.float32).eval()
    model = new_model(DRAFT, seed=1)
    teach, forward = (
        (torch.compile(teacher), torch.compile(model)) if compiled else (teacher, model)
    )
    own = np.concatenate(
        [np.load(file).ravel() for file in sorted((WORK / "outputs").glob("*.npy"))]
    ).astype(np.int32)

    def loss(rows: Tensor, _: float) -> Tensor:
        with torch.no_grad(), loop.low_precision(rows.device):
            wanted = teach(rows, use_cache=False).logits.float()
        with loop.low_precision(rows.device):
            got = forward(rows, use_cache=False).logits.float()
        return forward_kl(got.flatten(0, 1), wanted.flatten(0, 1))

    train_model(
        "draft",
        model,
        loss,
        [own, training_stream()],
        loop.TrainingSettings(steps, seed=7, decay=DECAY),
    )


def main(
    stages: Annotated[
        list[TrainingStage] | None, typer.Argument(help="default: all, in order")
    ] = None,
    target_steps: int = 900,
    draft_steps: int = 900,
    output_tokens: int = 1_000_000,
    compiled: Annotated[
        bool, typer.Option(help="torch.compile: about 1.5 times as fast; needs a C++ compiler")
    ] = shutil.which("g++") is not None,
) -> None:
    for stage in stages or list(TrainingStage):
        match stage:
            case TrainingStage.tokenizer:
                train_tokenizer()
            case TrainingStage.target:
                train_target(target_steps, compiled)
            case TrainingStage.outputs:
                write_outputs(output_tokens)
            case TrainingStage.draft:
                train_draft(draft_steps, compiled)
            case TrainingStage.medusa | TrainingStage.hidden_transfer | TrainingStage.s3d:
                train_head(stage.value, WORK / "outputs")
            case TrainingStage.card:
                write_card(WORK)


if __name__ == "__main__":
    typer.run(main)
