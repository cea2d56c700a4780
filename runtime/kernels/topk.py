"""Top-k per row, on a CPU faster than torch.topk(), which passes every element through a heap."""

import torch

BLOCK = 64  # elements


def topk(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values and indices (rows, k) of the k highest of `scores` (rows, n), falling; k <= n.

    On a CPU it first finds the blocks with the k highest maxima, which contain the k highest
    elements.
    """
    rows, n = scores.shape
    blocks = n // BLOCK
    if scores.device.type != "cpu" or k >= blocks:
        found = scores.topk(k, dim=-1)
        return found.values, found.indices
    whole = blocks * BLOCK
    best = scores[:, :whole].reshape(rows, blocks, BLOCK).amax(dim=-1).topk(k, dim=-1).indices
    places = (best[:, :, None] * BLOCK + torch.arange(BLOCK)).view(rows, k * BLOCK)
    if whole < n:
        places = torch.cat([places, torch.arange(whole, n).expand(rows, -1)], dim=1)
    found = scores.gather(1, places).topk(k, dim=-1)
    return found.values, places.gather(1, found.indices)
