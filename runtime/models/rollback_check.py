"""Verifies that a model can be a tree target: hidden rows stay hidden, and a rollback leaves no
trace.
"""

import numpy as np
import torch

from runtime.core.errors import InvalidRequest, ModelRefused
from runtime.models.base import PassInput, Rows, causal
from runtime.models.hf import MODEL_ERRORS, ROUNDING_TOLERANCE, HFModel, relative_error
from runtime.models.prefill import prefill

PREFIX_TOKENS = 5
MAX_TRIES = 3


def check_rollback(model: HFModel) -> float:
    """Compare tree passes, a rollback and a packed pass with a plain pass.

    In float32 the plain pass is transformers' own code. In 16 bits two programs differ by rounding
    as much as by a fault, so the plain pass is the model's own on an empty cache, which
    `enable_fast_path` has compared with transformers.

    Returns the worst relative error (root mean square) of a row's logits. Raises ModelRefused if
    rounding does not explain it. Several texts are tried: one may lie at the border between two
    experts, which rounding alone can change.
    """
    allowed = ROUNDING_TOLERANCE[model.dtype == torch.float32]
    error = float("inf")
    for seed in range(MAX_TRIES):
        tokens = np.random.default_rng(seed).integers(0, model.vocabulary, PREFIX_TOKENS + 6)
        try:
            error = min(error, worst_row_error(model, tokens))
        except (InvalidRequest, *MODEL_ERRORS) as cause:
            raise ModelRefused(
                f"model {model.name} cannot read a token tree ({cause}): "
                "choose another architecture"
            ) from cause
        if error <= allowed:
            return error
    raise ModelRefused(
        f"model {model.name} cannot be rolled back exactly "
        f"(logits of a tree are off by {error:.2g}, allowed {allowed:g}): "
        "choose a model of plain attention"
    )


def worst_row_error(model: HFModel, tokens: np.ndarray[tuple[int], np.dtype[np.int64]]) -> float:
    prefix, (root, left, right, left2, right2, end) = tokens[:PREFIX_TOKENS], tokens[PREFIX_TOKENS:]
    by_left = plain_logits(model, [*prefix, root, left, left2])
    by_right = plain_logits(model, [*prefix, root, right, right2, end])
    cache = model.new_cache()
    prefill(model, cache, prefix)
    ancestors = np.array(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]],
        dtype=np.bool_,
    )
    tree = np.array([root, left, right, left2, right2])
    rows = model.forward(
        cache, Rows(tree, PREFIX_TOKENS + np.array([0, 1, 1, 2, 2]), PREFIX_TOKENS, ancestors)
    )
    cache.keep(PREFIX_TOKENS + 1, [PREFIX_TOKENS + 2, PREFIX_TOKENS + 4])
    after = model.forward(cache, causal(np.array([end]), PREFIX_TOKENS + 3))
    cache.truncate(PREFIX_TOKENS)
    again = model.forward(cache, causal(np.array([root]), PREFIX_TOKENS))
    cache.truncate(PREFIX_TOKENS)
    longer, branches = (
        cache.fork(PREFIX_TOKENS),
        (np.array([root, left, left2]), np.array([right, right2, end])),
    )
    model.forward(longer, causal(np.array([root]), PREFIX_TOKENS), last=0)
    packed = model.forward_all(
        [
            PassInput(cache, causal(branches[0], PREFIX_TOKENS)),
            PassInput(longer, causal(branches[1], PREFIX_TOKENS + 1), last=2),
        ]
    )
    got = torch.cat([rows, after, again, *packed])
    expected = torch.cat(
        [by_left[[0, 1]], by_right[[1]], by_left[[2]], by_right[[2, 3, 0]], by_left, by_right[2:]]
    )
    return relative_error(got, expected)


def plain_logits(model: HFModel, tokens: list[int]) -> torch.Tensor:
    """Return the logits after the prefix, without tree masks and, in float32, without our cache."""
    if model.dtype != torch.float32:
        return model.forward(model.new_cache(), causal(np.array(tokens), 0))[PREFIX_TOKENS:]
    with torch.inference_mode():
        ids = torch.tensor([tokens], device=model.device)
        logits: torch.Tensor = model.module(input_ids=ids, use_cache=False).logits[
            0, PREFIX_TOKENS:
        ]
        return logits.float()
