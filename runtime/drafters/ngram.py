"""Prompt lookup: proposes what followed the latest earlier occurrence of the last tokens.

See Saxena (2023) and LLMA (arXiv 2304.04487).
"""

from collections.abc import Sequence

import numpy as np

from runtime.core.draft_nodes import DraftNodes
from runtime.drafters.base import DrafterContext, ExpandRequest, Text

MAX_NGRAM = 4  # tokens that must match; longer matches are tried first
MIN_NGRAM = 2
LOOK_BACK_TOKENS = 1024  # tokens searched


class NgramDrafter:
    """Stateless: each answer is computed from the text."""

    feature_spec = None

    def expand(self, requests: Sequence[ExpandRequest]) -> list[DraftNodes]:
        return [self.guess(request.text, request.leaves) for request in requests]

    def guess(self, text: Text, leaves: Sequence[int]) -> DraftNodes:
        parents: list[int] = []
        tokens: list[int] = []
        scores: list[float] = []
        recent = text.tokens[-LOOK_BACK_TOKENS:]
        for leaf in leaves:
            found = lookup([*recent, *text.tree.tokens_to(leaf)])
            if found is not None:
                token, length = found
                parents.append(leaf)
                tokens.append(token)
                scores.append(float(np.log(length / (length + 1.0))))
        return DraftNodes(
            np.asarray(parents, dtype=np.int32),
            np.asarray(tokens, dtype=np.int32),
            np.asarray(scores, dtype=np.float32),
        )

    def close(self, session: str) -> None:
        pass


def lookup(tokens: Sequence[int]) -> tuple[int, int] | None:
    """Find the latest earlier occurrence of the longest suffix.

    Returns the token that followed it and the length of the suffix, or None if nothing matches.
    """
    text = np.asarray(tokens)
    for length in range(min(MAX_NGRAM, len(text) - 1), MIN_NGRAM - 1, -1):
        windows = np.lib.stride_tricks.sliding_window_view(text[:-1], length)
        places = np.flatnonzero((windows == text[-length:]).all(axis=1))
        if len(places):
            return int(text[places[-1] + length]), length
    return None


def build(context: DrafterContext) -> NgramDrafter:
    return NgramDrafter()
