"""Training of heads: what a head guesses at each place ahead is drawn towards what the target itself says there, later."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from training.loop import Loss
from training.losses import forward_kl
from training.teacher import States, Teacher

# Of a batch of texts: states after the final norm (positions, batch, context, hidden), for each position ahead; and a loss of their own.
Forward = Callable[[States], tuple[Tensor, Tensor]]

DRAFT_OFFSET, HEAD_OFFSET = (
    1,
    2,
)  # offsets: how far behind its row the first place is that is guessed. What is at 1 the target itself says in the row
POSITION_DECAY = 0.8  # weight of each position against the one before: what is further ahead is reached less often (Medusa, arXiv 2401.10774)


def distillation(teacher: Teacher, forward: Forward, offset: int = HEAD_OFFSET) -> Loss:
    """Forward KL to the target's own distribution at each position, plus what `forward` itself asks for.

    The state of position i in row p says what is at p + offset + i; so does the target's own state in row p + offset - 1 + i.
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


def head_guesser(teacher: Teacher, forward: Forward) -> Callable[[Sequence[int]], Tensor]:
    """Logits (positions, context, vocabulary) of a text's heads, on the CPU."""

    def guess(text: Sequence[int]) -> Tensor:
        with torch.no_grad():
            states, _ = forward(teacher.states(torch.tensor([text], device=teacher.model.device)))
            return teacher.unembed(states[:, 0]).cpu()

    return guess
