"""A drafter that asks for hidden states, and what they must be."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from runtime.core.draft_nodes import DraftNodes
from runtime.core.features import FeatureBits, FeatureRows, FeatureSpec
from runtime.draft.draft_engine import DraftEngine
from runtime.drafters.base import ExpandRequest
from runtime.models.base import OutputSpec, PassInput, causal
from runtime.models.hf import HFModel
from runtime.models.sampler import choose
from tests.support.families import VOCABULARY
from tests.support.harness import Known, Lockstep, continued, engine_of

PROMPT = [int(token) for token in np.random.default_rng(1).integers(0, VOCABULARY, 90)]
BFLOAT16_STEP = 2**-7  # largest relative distance of two neighbours
LAYERS = (0, 1, 2)


class Watching(Known):
    """Guesses like Known once it has all features, and keeps what it was asked about.

    A guess is wrong where the text differs from `text`, so `text` sets how much is rolled back.
    """

    def __init__(
        self, text: Sequence[int], layers: tuple[int, ...] = LAYERS, branches: int = 2
    ) -> None:
        super().__init__(text, VOCABULARY, branches)
        self.layers = layers
        self.seen: list[tuple[tuple[int, ...], FeatureRows | None]] = []

    @property
    def feature_spec(self) -> FeatureSpec:  # type: ignore[override]
        return FeatureSpec(self.layers)

    def expand(self, requests: Sequence[ExpandRequest]) -> list[DraftNodes | None]:  # type: ignore[override]
        return [self.watch(request) for request in requests]

    def watch(self, request: ExpandRequest) -> DraftNodes | None:
        text, found = request.text, request.text.features
        self.seen.append((tuple(text.tokens), found))
        if (0 if found is None else found.end) < len(text.tokens) - 1:
            return None
        return self.guess(text, request.leaves)

    def complete(self) -> list[tuple[tuple[int, ...], FeatureRows]]:
        """What it was asked with features of all tokens but the last."""
        return [
            (tokens, found)
            for tokens, found in self.seen
            if found is not None and found.end == len(tokens) - 1
        ]


def numbers(rows: FeatureBits) -> torch.Tensor:
    return torch.from_numpy(rows.view(np.int16).copy()).view(torch.bfloat16).float()


def forced(model: HFModel, tokens: Sequence[int], layers: tuple[int, ...] = LAYERS) -> FeatureBits:
    """The features of a text that the model reads in one pass."""
    part = PassInput(model.new_cache(), causal(np.asarray(tokens, dtype=np.int64), 0), last=0)
    (output,) = model.forward_outputs([part], OutputSpec(features=layers))
    assert output.features is not None
    return output.features.rows


def check_seen(
    model: HFModel,
    seen: Iterable[tuple[tuple[int, ...], FeatureRows | None]],
    layers: tuple[int, ...] = LAYERS,
) -> int:
    """Compares all features with a pass over the same text; returns how many rows were compared.

    Rounding of float32 may tip a number to its neighbour in bfloat16, and does so rarely.
    """
    compared = 0
    longest: dict[tuple[int, ...], FeatureBits] = {}
    for tokens, found in sorted(seen, key=lambda one: -len(one[0])):
        if found is None:
            continue
        assert found.end < len(tokens)
        whole = next((text for text in longest if text[: len(tokens)] == tokens), None)
        if whole is None:
            longest[tokens], whole = forced(model, tokens, layers), tokens
        expected = longest[whole][found.start : found.end]
        assert found.rows.shape == expected.shape
        torch.testing.assert_close(
            numbers(found.rows), numbers(expected), rtol=BFLOAT16_STEP, atol=1e-5
        )
        assert (found.rows != expected).sum() <= 2 + expected.size // 100
        compared += len(expected)
    return compared


def misled(model: HFModel, prompt: list[int], count: int) -> list[int]:
    """The target's text with every seventh token changed: guesses are right, then wrong."""
    text = continued(model, prompt, count, chooser=choose)
    return [
        (token + (place % 7 == 0 and place >= len(prompt))) % VOCABULARY
        for place, token in enumerate(text)
    ]


def lockstep(model: HFModel, *drafters: Any, rows: int = 8, **options: Any) -> Lockstep:
    engines = [DraftEngine(drafter, f"d-{n}", 4) for n, drafter in enumerate(drafters)]
    return Lockstep(engine_of(model, rows, chooser=choose), *engines, **options)
