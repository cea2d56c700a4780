"""The last training stage: it measures the pair and writes models/README.md and models/loss.png."""

import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track
from torch.nn import functional as F

from runtime.core.sampling_params import SamplingParams
from runtime.models.acceptance import RANKS, acceptance
from runtime.models.hf import HFModel
from runtime.models.loader import load_model, load_tokenizer
from training import stdlib_corpus
from training.loop import smooth
from training.shipped.pair_shapes import CONTEXT, DRAFT, MODELS, TARGET, VOCABULARY

TEMPERATURES = (0.0, 0.5, 1.0)
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 40, 64, 128

TEMPLATE = """# The shipped pair

Two small Llama models that continue Python code, so that everything here can be tried, tested and
measured without a download. They imitate Python's look, not its meaning: do not use their code.

| | target (`models/target`) | draft (`models/draft`) |
|---|---|---|
| parameters | {target_size:.2f} million | {draft_size:.2f} million |
| shape (hidden, layers, feed-forward) | {target_shape} | {draft_shape} |
| trained on | {target_tokens:.1f}M tokens, next-token | {draft_tokens:.1f}M tokens, KL to target |
| final training loss | {target_loss:.3f} nats per token | {draft_loss:.3f} nats per token (KL) |
| held-out perplexity | {target_perplexity:.1f} | {draft_perplexity:.1f} |
| file | bf16 safetensors, {target_bytes:.1f} MB | bf16 safetensors, {draft_bytes:.1f} MB |

Both share one byte-level BPE tokenizer of {vocabulary} tokens and a context of {context} tokens.

## Data

The sources of the Python {python} standard library of the interpreter that ran the training:
{files} files for training and {held_out} held out (one in twenty, by a hash of the path, so the
split is the same everywhere). One test module in four is included; encoding tables are excluded.
The draft learned from the target: half of its text is the target's own continuations of training
excerpts (temperatures 0, 0.5 and 1), half is the library.

Licence: the Python standard library is under the PSF License Agreement, version 2
(<https://docs.python.org/3/license.html>), which permits derived works; the weights are published
under the project's Apache-2.0.

## Acceptance

How often the draft's first k guesses contain the token that the target chooses, on {prompts}
excerpts of {prompt_tokens} tokens from held-out files, continued by the target for up to
{new_tokens} tokens. At temperature > 0 draft and target use the same noise, as in the runtime.

{acceptance}

## Heads

Besides the draft there are heads on the target, trained on the same texts by
`python -m training.shipped medusa hidden-transfer`, each with its card:
[medusa](heads/medusa/README.md), [hidden-transfer](heads/hidden-transfer/README.md).
`python -m training.shipped s3d` trains a drafter from three of the target's layers:
[s3d](s3d/README.md).

## Loss

![training loss](loss.png)

`make train` (`python -m training.shipped`) uses Muon for the matrices and AdamW for embeddings and
norms, with warm-up, hold and linear decay, in float32 unless the processor multiplies bf16
natively. It resumes after an interruption; this page is its last stage.
"""


def write_card(work: Path) -> None:
    target, draft = (
        load_model(str(MODELS / name), "float32", "cpu") for name in ("target", "draft")
    )
    tokenizer = load_tokenizer(str(MODELS / "target"))
    logs = {name: read_log(work / name / "loss.jsonl") for name in ("target", "draft")}
    draw_losses(logs, MODELS / "loss.png")
    held_out = stdlib_corpus.token_stream(
        tokenizer.backend_tokenizer, stdlib_corpus.library_files(held_out=True)
    )
    page = TEMPLATE.format(
        target_size=million_parameters(target),
        draft_size=million_parameters(draft),
        target_shape=f"{TARGET.hidden}, {TARGET.layers}, {TARGET.intermediate}",
        draft_shape=f"{DRAFT.hidden}, {DRAFT.layers}, {DRAFT.intermediate}",
        target_tokens=logs["target"][-1][0] / 1e6,
        draft_tokens=logs["draft"][-1][0] / 1e6,
        target_loss=smooth(losses_of(logs["target"]))[-1],
        draft_loss=smooth(losses_of(logs["draft"]))[-1],
        target_perplexity=perplexity(target, held_out),
        draft_perplexity=perplexity(draft, held_out),
        target_bytes=(MODELS / "target" / "model.safetensors").stat().st_size / 1e6,
        draft_bytes=(MODELS / "draft" / "model.safetensors").stat().st_size / 1e6,
        vocabulary=VOCABULARY,
        context=CONTEXT,
        python=platform.python_version(),
        files=len(stdlib_corpus.library_files(held_out=False)),
        held_out=len(stdlib_corpus.library_files(held_out=True)),
        prompts=PROMPTS,
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=NEW_TOKENS,
        acceptance=acceptance_table(
            target,
            draft,
            stdlib_corpus.prompts(tokenizer.backend_tokenizer, PROMPTS, PROMPT_TOKENS),
        ),
    )
    (MODELS / "README.md").write_text(page)


def million_parameters(model: HFModel) -> float:
    return float(sum(parameter.numel() for parameter in model.module.parameters())) / 1e6


def acceptance_table(target: HFModel, draft: HFModel, prompts: Sequence[Sequence[int]]) -> str:
    rows = [
        "| temperature | " + " | ".join(f"k = {rank}" for rank in RANKS) + " |",
        "|---" * (len(RANKS) + 1) + "|",
    ]
    eos = frozenset({int(target.module.config.eos_token_id)})
    for temperature in track(TEMPERATURES, description="acceptance"):
        sampling = SamplingParams(temperature=temperature, seed=1, max_tokens=NEW_TOKENS)
        rates = acceptance(target, draft, prompts, sampling, eos)
        rows.append(
            f"| {temperature:g} | " + " | ".join(f"{rates[rank]:.3f}" for rank in RANKS) + " |"
        )
    return "\n".join(rows)


def perplexity(model: HFModel, stream: npt.NDArray[np.uint16]) -> float:
    """Return exp of the mean next-token loss over windows of the whole context."""
    rows = torch.from_numpy(stream[: len(stream) // CONTEXT * CONTEXT].astype(np.int64)).view(
        -1, CONTEXT
    )
    losses: list[float] = []
    with torch.inference_mode():
        for batch in track(rows.split(8), description="perplexity"):
            logits = model.module(batch, use_cache=False).logits
            losses.append(
                float(F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()))
                * len(batch)
            )
    return math.exp(sum(losses) / len(rows))


def read_log(file: Path) -> list[tuple[int, float]]:
    """Return (tokens, loss) of each step; a step repeated after an interruption counts once."""
    steps = {
        entry["step"]: (entry["tokens"], entry["loss"])
        for entry in map(json.loads, file.read_text().splitlines())
    }
    return [steps[step] for step in sorted(steps)]


def losses_of(log: Sequence[tuple[int, float]]) -> list[float]:
    return [loss for _, loss in log]


def draw_losses(logs: dict[str, list[tuple[int, float]]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6))
    titles = {"target": "target: next-token loss (nats)", "draft": "draft: KL to the target (nats)"}
    for axis, (name, log) in zip(axes, logs.items(), strict=True):
        axis.plot([tokens / 1e6 for tokens, _ in log], losses_of(log), alpha=0.3, linewidth=0.8)
        axis.plot([tokens / 1e6 for tokens, _ in log], smooth(losses_of(log)), linewidth=1.5)
        axis.set(title=titles[name], xlabel="million tokens")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
