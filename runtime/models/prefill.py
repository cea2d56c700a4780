"""Reads a long text in chunks, so that masks and activations stay small."""

import numpy as np
import numpy.typing as npt

from runtime.core.errors import InvalidRequest
from runtime.kv.base import KVCache
from runtime.models.base import Logits, Model, causal


def prefill(
    model: Model, cache: KVCache, tokens: npt.NDArray[np.int64], chunk: int = 512
) -> Logits:
    """Append `tokens` to a cache of plain text; return the logits (1, vocabulary) after the last
    one.

    Raises InvalidRequest for no tokens. If a chunk fails, the cache keeps the chunks before it.
    """
    if len(tokens) == 0:
        raise InvalidRequest("the text is empty: give at least one token", "prompt")
    logits: Logits = None
    for start in range(0, len(tokens), chunk):
        logits = model.forward(cache, causal(tokens[start : start + chunk], cache.length), last=1)
    return logits
