"""The target as its own drafter, with a share of its guesses spoilt: for tests and for measuring what acceptance is worth."""

from collections.abc import Sequence

import numpy as np

from runtime.core.draft_nodes import DraftNodes
from runtime.drafters.base import Drafter, DrafterContext, ExpandRequest
from runtime.drafters.model import ModelDrafter

WRONG = 0.3


class Noisy:
    """`wrong` 0 is a perfect drafter, 1 one that is always wrong. Which guesses are spoilt depends on the text alone."""

    def __init__(self, inner: Drafter, vocabulary: int, wrong: float = WRONG) -> None:
        self.inner, self.vocabulary, self.wrong = inner, vocabulary, wrong

    def expand(self, wishes: Sequence[ExpandRequest]) -> list[DraftNodes | None]:
        answers = self.inner.expand(wishes)
        return [
            found and self.spoil(wish, found) for wish, found in zip(wishes, answers, strict=True)
        ]

    def spoil(self, wish: ExpandRequest, found: DraftNodes) -> DraftNodes:
        keys = np.asarray([wish.text.tree.key[parent] for parent in found.parents], dtype=np.uint64)
        spoilt = (keys >> np.uint64(11)) < np.uint64(int(self.wrong * 2**53))
        tokens = np.where(spoilt, (found.tokens + 1) % self.vocabulary, found.tokens)
        return DraftNodes(found.parents, tokens.astype(np.int32), found.scores)

    def close(self, session: str) -> None:
        self.inner.close(session)


def build(ingredients: DrafterContext) -> Noisy:
    model = ingredients.load(ingredients.target)
    return Noisy(ModelDrafter(model, branches=1), model.vocabulary)
