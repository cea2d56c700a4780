"""Drafts with the target itself and corrupts a share of the guesses: for tests and measurements."""

from collections.abc import Sequence

import numpy as np

from runtime.core.draft_nodes import DraftNodes
from runtime.core.features import FeatureSpec
from runtime.drafters.base import Drafter, DrafterContext, ExpandRequest
from runtime.drafters.model import ModelDrafter

WRONG_RATE = 0.3


class NoisyDrafter:
    """Corrupts the share `wrong` of the guesses of `inner`: 0 is perfect, 1 always wrong.

    The text alone determines which guesses are corrupted.
    """

    def __init__(self, inner: Drafter, vocabulary: int, wrong: float = WRONG_RATE) -> None:
        self.inner, self.vocabulary, self.wrong = inner, vocabulary, wrong

    @property
    def feature_spec(self) -> FeatureSpec | None:
        return self.inner.feature_spec

    def expand(self, requests: Sequence[ExpandRequest]) -> list[DraftNodes | None]:
        answers = self.inner.expand(requests)
        return [
            found and self.corrupt(request, found)
            for request, found in zip(requests, answers, strict=True)
        ]

    def corrupt(self, request: ExpandRequest, found: DraftNodes) -> DraftNodes:
        keys = np.asarray(
            [request.text.tree.key[parent] for parent in found.parents], dtype=np.uint64
        )
        corrupted = (keys >> np.uint64(11)) < np.uint64(int(self.wrong * 2**53))
        tokens = np.where(corrupted, (found.tokens + 1) % self.vocabulary, found.tokens)
        return DraftNodes(found.parents, tokens.astype(np.int32), found.scores)

    def close(self, session: str) -> None:
        self.inner.close(session)


def build(context: DrafterContext) -> NoisyDrafter:
    model = context.load(context.target)
    return NoisyDrafter(ModelDrafter(model, branches=1), model.vocabulary)
