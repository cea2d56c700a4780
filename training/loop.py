"""The training loop of all methods. It resumes an interrupted training with identical bits on a
CPU."""

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
]  # token ids (batch, context), share of finished steps -> scalar
Batches = Callable[[int], Tensor]  # step -> token ids (batch, context)
StepCallback = Callable[[int, float], None]  # finished steps, last loss

CHECKPOINT_EVERY = 50  # steps
WARM_UP = 0.02  # shares of all steps
DECAY = 0.35


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """The settings of a training.

    matrix_rate  Muon's learning rate, for matrices
    other_rate   AdamW's learning rate, for everything else
    decay        weight decay of the matrices
    """

    steps: int
    seed: int = 0
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    decay: float = 0.0


def learning_rate_at(step: int, steps: int) -> float:
    """Return the factor of the learning rate: warm up, hold, then decay linearly to a twentieth.

    This is the warm-up/stable/decay schedule (arXiv 2404.06395).
    """
    warm = min(1.0, (step + 1) / max(1.0, WARM_UP * steps))
    left = min(1.0, (steps - step) / max(1.0, DECAY * steps))
    return min(warm, max(0.05, left))


def optimizers(module: nn.Module, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices (kellerjordan.github.io/posts/muon) and AdamW for embeddings,
    unembedding and the rest."""
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
    """Return an autocast to bfloat16 if the device multiplies it natively; otherwise it would be
    slower."""
    if device.type == "cuda":
        return torch.autocast(
            "cuda", torch.bfloat16, enabled=torch.cuda.is_bf16_supported(including_emulation=False)
        )
    return torch.autocast("cpu", torch.bfloat16, enabled=cpu_multiplies_bfloat16())


def cpu_multiplies_bfloat16() -> bool:
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def train(
    module: nn.Module,
    loss: Loss,
    batches: Batches,
    settings: TrainingSettings,
    checkpoint: Path,
    tell: StepCallback,
) -> list[float]:
    """Train up to `settings.steps`, resuming from `checkpoint` if it exists; return the losses of
    all steps.

    A resumed training ends with the same bits as an uninterrupted one on the same machine, on a CPU
    and with the same number of threads, because a step depends only on parameters, optimizers, seed
    and step number. Only parameters that require a gradient are saved. Raises InvalidRequest if the
    loss becomes non-finite or the checkpoint is invalid.
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
    buffer = io.BytesIO()  # torch's own writer reports a full disk without errno
    torch.save(state, buffer)
    write_atomically(checkpoint, buffer.getvalue())


def load_checkpoint(
    checkpoint: Path, learned: dict[str, nn.Parameter], optims: list[torch.optim.Optimizer]
) -> list[float]:
    """Restore parameters and optimizers, and return the losses so far."""
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
            f"{checkpoint} is not a checkpoint of this training: remove {checkpoint.parent} "
            "to start over",
            "out",
        ) from error


def smooth(losses: list[float], over: int = 20) -> list[float]:
    """Return running means over the last `over` losses."""
    return [
        sum(losses[max(0, i + 1 - over) : i + 1]) / min(i + 1, over) for i in range(len(losses))
    ]
