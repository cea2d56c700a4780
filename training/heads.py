"""Training of heads: each position's guess is distilled from what the target predicts there
later."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from training.loop import Loss
from training.losses import forward_kl
from training.teacher import States, Teacher

# States after the final norm (positions, batch, context, hidden) for a batch of texts, one for each
# position ahead, and an additional loss.
Forward = Callable[[States], tuple[Tensor, Tensor]]

DRAFT_OFFSET, HEAD_OFFSET = (
    1,
    2,
)  # offset of the first guessed position from its row; the target itself predicts offset 1
# weight of each position relative to the one before, because later ones are reached less often
# (Medusa, arXiv 2401.10774)
POSITION_DECAY = 0.8


def distillation(teacher: Teacher, forward: Forward, offset: int = HEAD_OFFSET) -> Loss:
    """Return the forward KL to the target's distribution at each position, plus the loss of
    `forward`.

    The state of position i in row p predicts the token at p + offset + i; so does the target's own
    state in row p + offset - 1 + i.
    """

    def loss(rows: Tensor, _: float) -> Tensor:
        seen = teacher.states(rows.to(teacher.model.device))
        with torch.no_grad():
            truth = teacher.unembed(seen.last[:, offset - 1 :])
        states, total = forward(seen)
        for i, state in enumerate(states):
            n = state.shape[1] - (offset - 1) - i
            total = total + POSITION_DECAY**i * forward_kl(
                teacher.unembed(state[:, :n]).flatten(0, 1), truth[:, i:].flatten(0, 1)
            )
        return total

    return loss


def head_guesser(teacher: Teacher, forward: Forward) -> Callable[[Sequence[int], int], Tensor]:
    """Return a function from a text and a first row to the heads' logits (positions, rows,
    vocabulary) on the CPU."""

    def guess(text: Sequence[int], first: int) -> Tensor:
        with torch.no_grad():
            states, _ = forward(teacher.states(torch.tensor([text], device=teacher.model.device)))
            return teacher.unembed(states[:, 0, first:]).cpu()

    return guess
