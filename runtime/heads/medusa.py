"""Medusa (Cai et al. 2024, arXiv 2401.10774): residual blocks turn the last hidden state into states of the places after the next.

Unlike there, all share the target's own unembedding, frozen: one of each head's own would be as large as that, in the file and in every
step. Heads are trained; the target is left as it is.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from runtime.core.draft_nodes import DraftNodes
from runtime.core.errors import ModelRefused
from runtime.core.tree_builder import best_first
from runtime.heads.base import HeadContext, VerifiedStep, ask_ahead
from runtime.models.base import HiddenStateModel, OutputSpec
from runtime.models.head_checkpoint import TRAIN_HINT, read_settings, read_tensors, whole_number
from runtime.models.sampler import candidates_all

BRANCHES = 6  # guesses of a place
MAX_HEADS = 16  # heads, and blocks of a head


class Medusa(nn.Module):
    """States (..., heads, d) out of hidden states (..., d). The target's unembedding makes of state i what is 2 + i places on.

    Weights begin at zero: an untrained head says of its place what the target says of the next.
    """

    def __init__(self, hidden_size: int, heads: int, blocks: int = 1) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(blocks))
            for _ in range(heads)
        )
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.stack([apply_blocks(blocks, hidden) for blocks in self.heads], dim=-2)


def apply_blocks(blocks: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for block in blocks.children():
        x = x + F.silu(block(x))
    return x


class MedusaHead:
    """A Head. It keeps nothing of a session: the row that the target stopped at says it all."""

    output_spec = OutputSpec(hidden=True)

    def __init__(self, model: HiddenStateModel, module: Medusa) -> None:
        self.model, self.module = model, module

    def propose(self, seen: Sequence[VerifiedStep]) -> list[DraftNodes]:
        with torch.inference_mode():
            states = self.module(torch.stack([one.output.hidden[one.path[-1]] for one in seen]))
            logits = self.model.unembed(states.flatten(0, 1)).unflatten(0, states.shape[:2])
            asks = [ask_ahead(one, logits.shape[1]) for one in seen]
            guesses = candidates_all(
                [(rows, ask, BRANCHES) for rows, ask in zip(logits, asks, strict=True)]
            )
        return [best_first(*guess) for guess in guesses]

    def close(self, session: str) -> None:
        pass


def build(context: HeadContext) -> MedusaHead:
    """Raises ModelRefused where nothing was trained for this target."""
    if context.folder is None:
        raise ModelRefused(
            f"no medusa ships for this target: {TRAIN_HINT} medusa, and give its folder"
        )
    settings, d = (
        read_settings(context.folder, "medusa", context.identity),
        context.identity.hidden_size,
    )
    heads, blocks = (
        whole_number(context.folder, settings, name, 1, MAX_HEADS) for name in ("heads", "blocks")
    )
    shapes: dict[str, tuple[int, ...]] = {}
    for name in (f"heads.{head}.{block}" for head in range(heads) for block in range(blocks)):
        shapes |= {f"{name}.weight": (d, d), f"{name}.bias": (d,)}
    module = Medusa(d, heads, blocks)
    module.load_state_dict(read_tensors(context.folder, shapes))
    return MedusaHead(
        context.model,
        module.to(context.model.device, context.model.dtype).eval().requires_grad_(False),
    )
