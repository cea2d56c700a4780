"""Training of Medusa heads (arXiv 2401.10774, Medusa-1: the target is frozen)."""

import torch
from torch import Tensor

from runtime.heads.medusa import Medusa
from training.heads import Forward
from training.teacher import States


def make_forward(heads: Medusa) -> Forward:
    def states(seen: States) -> tuple[Tensor, Tensor]:
        found = heads(seen.last.float()).movedim(-2, 0)
        return found, torch.zeros((), device=found.device)

    return states
