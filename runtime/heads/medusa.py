"""Medusa (Cai et al. 2024, arXiv 2401.10774): residual blocks map the last hidden state to later
places.

Unlike in the paper, all heads share the target's frozen unembedding: one per head would multiply
the size of the file and the cost of each step. Only the heads are trained; the target does not
change.
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

BRANCHES = 6  # guesses per place
MAX_HEADS = 16  # also the limit on blocks per head


class Medusa(nn.Module):
    """Maps hidden states (..., d) to states (..., heads, d).

    The target's unembedding turns state i into the logits of the place 2 + i tokens later. Weights
    are initialised to zero: an untrained head predicts for its place what the target predicts for
    the next.
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
    """A stateless Head: it needs only the row at which the target stopped."""

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
    """Build the head. Raises ModelRefused if it was not trained for this target."""
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
