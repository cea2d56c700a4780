"""The distances between a draft's guesses and their target. Logits are (rows, vocabulary); results
are means over rows.

p is the target's distribution, q the draft's. With the best coupling of draft and target a draft
token is accepted with probability 1 - TVD(p, q) (Leviathan et al., 2211.17192), so the total
variation distance is what counts, and KL is a proxy for it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Distance = Callable[[Tensor, Tensor], Tensor]  # logits of the draft, of the target -> scalar


def next_token(draft: Tensor, tokens: Tensor) -> Tensor:
    """Return the cross-entropy with the actual next tokens (rows,), the usual language model
    loss."""
    return F.cross_entropy(draft, tokens)


def forward_kl(draft: Tensor, target: Tensor) -> Tensor:
    """Return KL(p || q) in nats."""
    return F.kl_div(
        draft.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean"
    )


def tvd(draft: Tensor, target: Tensor) -> Tensor:
    """Return half the sum of |p - q|: the share of the draft's tokens that the best coupling
    rejects."""
    return (target.softmax(-1) - draft.softmax(-1)).abs().sum(-1).mean() / 2


def tvd_plus_plus(draft: Tensor, target: Tensor) -> Tensor:
    """Return TVD++ (arXiv 2403.00858): TVD's gradient as a policy gradient with a normalised
    reward.

    A draft token has the reward r = 1 if p > q, else 0; the gradient of TVD is that of -E_q[r log
    q] with r held fixed. TVD++ replaces r by (r - mean) / deviation, both over all rows and tokens
    under q. Near the end, where almost everything or almost nothing is rewarded, the steps stay as
    large as at the start. The expectation is summed over the vocabulary, not sampled. The value is
    minus the covariance of normalised reward and log q, not a distance; only its gradient is
    meaningful.
    """
    logs = draft.log_softmax(-1)
    with torch.no_grad():
        q = logs.exp()
        reward = (target.softmax(-1) > q).to(q.dtype)
        mean = (q * reward).sum(-1).mean()
        deviation = (mean * (1 - mean)).clamp_min(1e-4).sqrt()
        weight = q * (reward - mean) / deviation
    return -(weight * logs).sum(-1).mean()
