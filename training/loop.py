"""One training loop for everything that is trained: it resumes where it was interrupted, to the same bits on a CPU."""

import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime.core.errors import InvalidRequest
from training.folder import write_atomically

Loss = Callable[
    [Tensor, float], Tensor
]  # token ids (batch, context), share of the steps that are done -> scalar
Batches = Callable[[int], Tensor]  # step -> token ids (batch, context)
StepCallback = Callable[[int, float], None]  # steps done, loss of the last

CHECKPOINT_EVERY = 50  # steps
WARM_UP = 0.02  # shares of all steps
DECAY = 0.35


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """`matrix_rate` is Muon's learning rate, for matrices; `other_rate` AdamW's, for all else; `decay` draws matrices towards nothing."""

    steps: int
    seed: int = 0
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    decay: float = 0.0


def learning_rate_at(step: int, steps: int) -> float:
    """Warm up, hold, then decay linearly to a twentieth (the warm-up/stable/decay schedule, arXiv 2404.06395)."""
    warm = min(1.0, (step + 1) / max(1.0, WARM_UP * steps))
    left = min(1.0, (steps - step) / max(1.0, DECAY * steps))
    return min(warm, max(0.05, left))


def optimizers(module: nn.Module, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices (kellerjordan.github.io/posts/muon), AdamW for embeddings, unembedding and the rest."""
    learned = [
        (name, parameter)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]
    matrices = [parameter for name, parameter in learned if is_matrix(name, parameter)]
    others = [parameter for name, parameter in learned if not is_matrix(name, parameter)]
    made: list[torch.optim.Optimizer] = []
    if matrices:
        made.append(
            torch.optim.Muon(matrices, lr=settings.matrix_rate, weight_decay=settings.decay)
        )
    if others:
        made.append(
            torch.optim.AdamW(others, lr=settings.other_rate, betas=(0.9, 0.95), weight_decay=0.0)
        )
    return made


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and "embed" not in name and "lm_head" not in name


def low_precision(device: torch.device) -> torch.autocast:
    """Inside it products are of bfloat16 where the device multiplies that natively; elsewhere it would be slower than float32."""
    if device.type == "cuda":
        return torch.autocast(
            "cuda", torch.bfloat16, enabled=torch.cuda.is_bf16_supported(including_emulation=False)
        )
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast("cpu", torch.bfloat16, enabled=native)


def train(
    module: nn.Module,
    loss: Loss,
    batches: Batches,
    settings: TrainingSettings,
    checkpoint: Path,
    tell: StepCallback,
) -> list[float]:
    """Run to `settings.steps`, from `checkpoint` where there is one. Returns the losses of all steps.

    Interrupted and begun again it ends with the same bits as without a break, on the same machine, device CPU, and number of threads:
    what a step does depends on parameters, optimizers, seed and step alone. Only parameters that require a gradient are kept.
    Raises InvalidRequest where the loss is no number any more, or the checkpoint is not one.
    """
    optims = optimizers(module, settings)
    rates = [group["lr"] for optim in optims for group in optim.param_groups]
    learned = {
        name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad
    }
    losses = load_checkpoint(checkpoint, learned, optims)
    tell(len(losses), losses[-1] if losses else math.nan)
    for step in range(len(losses), settings.steps):
        for group, rate in zip(
            (group for optim in optims for group in optim.param_groups), rates, strict=True
        ):
            group["lr"] = rate * learning_rate_at(step, settings.steps)
        torch.manual_seed(settings.seed * 1_000_003 + step)
        value = loss(batches(step), step / settings.steps)
        value.backward()
        nn.utils.clip_grad_norm_(learned.values(), 1.0)
        losses.append(float(value.detach()))
        if not math.isfinite(losses[-1]):
            raise InvalidRequest(
                f"the loss is {losses[-1]} at step {step}: check the data, or give another --seed",
                "data",
            )
        for optim in optims:
            optim.step()
            optim.zero_grad()
        tell(len(losses), losses[-1])
        if len(losses) % CHECKPOINT_EVERY == 0 or len(losses) == settings.steps:
            save_checkpoint(checkpoint, learned, optims, losses)
    return losses


def save_checkpoint(
    checkpoint: Path,
    learned: dict[str, nn.Parameter],
    optims: list[torch.optim.Optimizer],
    losses: list[float],
) -> None:
    state = {
        "learned": dict(learned),
        "optimizers": [optim.state_dict() for optim in optims],
        "losses": losses,
    }
    buffer = io.BytesIO()  # torch's own writer turns a full disk into an error without a name
    torch.save(state, buffer)
    write_atomically(checkpoint, buffer.getvalue())


def load_checkpoint(
    checkpoint: Path, learned: dict[str, nn.Parameter], optims: list[torch.optim.Optimizer]
) -> list[float]:
    """The losses so far; parameters and optimizers are as they were then."""
    if not checkpoint.exists():
        return []
    try:
        state: dict[str, Any] = torch.load(checkpoint, weights_only=True, map_location="cpu")
        with torch.no_grad():
            for name, parameter in learned.items():
                parameter.copy_(state["learned"][name])
        for optim, saved in zip(optims, state["optimizers"], strict=True):
            optim.load_state_dict(saved)
        return list(state["losses"])
    except (
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        raise InvalidRequest(
            f"{checkpoint} is no checkpoint of this training: remove {checkpoint.parent} to begin anew",
            "out",
        ) from error


def smooth(losses: list[float], over: int = 20) -> list[float]:
    """Means over the last `over` losses."""
    return [
        sum(losses[max(0, i + 1 - over) : i + 1]) / min(i + 1, over) for i in range(len(losses))
    ]
