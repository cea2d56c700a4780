"""One training loop for target and draft: resumable, with a progress bar, a log of losses and a warm-up/hold/decay schedule."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

Stream = npt.NDArray[np.uint16]
Loss = Callable[[Tensor], Tensor]  # token ids (batch, context) -> scalar

CHECKPOINT_EVERY = 50  # steps
WARM_UP = 0.02  # shares of all steps
DECAY = 0.35


@dataclass(frozen=True, slots=True)
class Settings:
    steps: int
    batch_tokens: int
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    seed: int = 0


def rate_at(step: int, steps: int) -> float:
    """Warm up, hold, then decay linearly to a twentieth (the warm-up/stable/decay schedule, arXiv 2404.06395)."""
    warm = min(1.0, (step + 1) / max(1.0, WARM_UP * steps))
    left = min(1.0, (steps - step) / max(1.0, DECAY * steps))
    return min(warm, max(0.05, left))


def context_at(step: int, steps: int, longest: int) -> int:
    """Half the context for the first three quarters, since attention's share of a step grows with it; then all of it."""
    return longest // 2 if step < 0.75 * steps else longest


def windows(stream: Stream, context: int, seed: int) -> Iterator[Tensor]:
    """Windows of `context` tokens for ever: every epoch cuts the stream at another offset, in another order."""
    generator = np.random.default_rng(seed)
    while True:
        offset = int(generator.integers(context))
        count = (len(stream) - offset) // context
        for index in generator.permutation(count):
            start = offset + int(index) * context
            yield torch.from_numpy(stream[start : start + context].astype(np.int64))


def optimizers(model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices (kellerjordan.github.io/posts/muon), AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=settings.matrix_rate, weight_decay=0.05),
        torch.optim.AdamW(others, lr=settings.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def fast_low_precision() -> bool:
    """bf16 pays only where the processor multiplies it natively; elsewhere it is slower than float32."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def train(model: nn.Module, loss: Loss, batches: Callable[[int, int], Iterator[Tensor]], settings: Settings, folder: Path) -> None:
    """Run to `settings.steps`, from the checkpoint in `folder` where there is one; leaves checkpoint.pt and loss.jsonl there.

    `batches(context_share_step, skip)` is asked again after a restart, with a seed that depends on the step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / "checkpoint.pt", folder / "loss.jsonl"
    optims = optimizers(model, settings)
    base = [group["lr"] for optim in optims for group in optim.param_groups]
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optim, saved in zip(optims, state["optimizers"], strict=True):
            optim.load_state_dict(saved)
        first = state["step"]
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with bar, log.open("a") as lines:
        task = bar.add_task(folder.name, total=settings.steps, completed=first)
        stream: Iterator[Tensor] | None = None
        context = 0
        for step in range(first, settings.steps):
            wanted = context_at(step, settings.steps, 512)
            if stream is None or wanted != context:
                context = wanted
                stream = batches(context, settings.seed + step)
            rows = torch.stack([next(stream) for _ in range(settings.batch_tokens // context)])
            groups = [group for optim in optims for group in optim.param_groups]
            for group, rate in zip(groups, base, strict=True):
                group["lr"] = rate * rate_at(step, settings.steps)
            with torch.autocast("cpu", torch.bfloat16, enabled=fast_low_precision()):
                value = loss(rows)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optim in optims:
                optim.step()
                optim.zero_grad()
            lines.write(
                json.dumps({"step": step, "tokens": (step + 1) * settings.batch_tokens, "loss": round(float(value.detach()), 4)}) + "\n"
            )
            lines.flush()
            bar.update(task, advance=1, description=f"{folder.name} loss {float(value.detach()):.3f}")
            if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == settings.steps:
                saved = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optims], "step": step + 1}
                torch.save(saved, folder / "checkpoint.tmp")
                (folder / "checkpoint.tmp").replace(checkpoint)
