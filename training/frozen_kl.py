"""The forward KL between two distributions over the vocabulary that share a frozen unembedding.

Both are computed in chunks that stay in the processor's cache, with the gradient beside the value:
logits of a whole batch are larger than the batch by the size of the vocabulary, and moving them
through memory took most of the time of a training step.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_LOGITS = 1 << 20  # of a chunk: 4 MB of float32


def frozen_kl(guess: Tensor, truth: Tensor, unembedding: Tensor) -> Tensor:
    """Return the mean KL(softmax(truth U') || softmax(guess U')) of n rows, a float32 scalar;
    0 without rows.

    The gradient goes to `guess` alone.

    guess, truth  (n, d), states after the final norm
    unembedding   U (K, d); its type is that of the products, unless autocast names another
    """
    device = guess.device.type
    if torch.is_autocast_enabled(device):
        unembedding = unembedding.to(torch.get_autocast_dtype(device))
    loss: Tensor = FrozenKL.apply(guess, truth, unembedding)  # type: ignore[no-untyped-call]
    return loss


class FrozenKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, guess: Tensor, truth: Tensor, unembedding: Tensor) -> Tensor:
        with torch.autocast(guess.device.type, enabled=False):
            rows, wanted = guess.to(unembedding.dtype), truth.to(unembedding.dtype)
            total = torch.zeros((), device=guess.device)
            gradient = torch.empty_like(rows)
            count = max(1, CHUNK_LOGITS // len(unembedding))
            for at in (slice(first, first + count) for first in range(0, len(rows), count)):
                logs = F.linear(rows[at], unembedding).float().log_softmax(-1)
                true_logs = F.linear(wanted[at], unembedding).float().log_softmax(-1)
                shares = true_logs.exp()
                total += torch.dot(shares.flatten(), true_logs.sub_(logs).flatten())
                slope = logs.exp_().sub_(shares).to(unembedding.dtype)
                torch.mm(slope, unembedding, out=gradient[at])
        n = max(1, len(rows))
        ctx.save_for_backward(gradient.to(guess.dtype) / n)
        return total / n

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * above, None, None
