"""Acceptance: how often guesses contain the token that the target chooses, on its own held-out
texts, by the runtime's coupled rule."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from runtime.core.sampler_reference import SamplingInput
from runtime.models.acceptance import RANKS
from runtime.models.sampler import candidates
from training.outputs import TargetText

# Logits (positions, rows, vocabulary) of a text from a row on: row p of position i predicts the
# token at p + offset + i.
Guess = Callable[[Sequence[int], int], Tensor]


@dataclass(frozen=True, slots=True)
class HeldOutAcceptance:
    """The acceptance at one temperature.

    rates  for each position ahead: share of the target's choices among the first k guesses, by k of
           RANKS
    chain  mean tokens of a step that verifies a chain of the best guess of each position, without a
           tree: from 1 to positions + 1
    """

    temperature: float
    rates: tuple[dict[int, float], ...]
    chain: float

    def as_json(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "positions": [{str(k): round(rate, 4) for k, rate in of.items()} for of in self.rates],
            "chain": round(self.chain, 4),
        }


def measure_acceptance(
    texts: Sequence[TargetText], guess: Guess, offset: int
) -> list[HeldOutAcceptance]:
    """Return the acceptance by rising temperature.

    `offset` is 1 for a draft, whose row predicts the next token, and 2 for a head, because the
    target itself predicts the next token.
    """
    temperatures = sorted({text.sampling.temperature for text in texts})
    return [
        acceptance_at(
            temperature,
            [text for text in texts if text.sampling.temperature == temperature],
            guess,
            offset,
        )
        for temperature in temperatures
    ]


def acceptance_at(
    temperature: float, texts: Sequence[TargetText], guess: Guess, offset: int
) -> HeldOutAcceptance:
    ranks = np.concatenate(
        [
            ranks_of(text, guess((*text.prompt, *text.output), len(text.prompt) - offset))
            for text in texts
        ],
        axis=1,
    )
    steps = max(1, ranks.shape[1])  # none if all answers are shorter than the positions
    rates = tuple({k: float(((of >= 0) & (of < k)).sum() / steps) for k in RANKS} for of in ranks)
    chain = np.logical_and.accumulate(ranks == 0, axis=0).sum() / steps
    return HeldOutAcceptance(temperature, rates, 1.0 + float(chain))


def ranks_of(text: TargetText, logits: Tensor) -> npt.NDArray[np.int64]:
    """Return (positions, n) ranks of the target's choice among the guesses, from 0, or -1 if
    absent.

    `logits` begin with the row that guesses the first output at position 0. Column m belongs to a
    step whose guesses begin at output m. The last steps, whose guesses reach beyond the text, are
    excluded.
    """
    positions, prompt, output = len(logits), len(text.prompt), np.asarray(text.output)
    n = max(0, len(output) - positions + 1)
    found = np.empty((positions, n), dtype=np.int64)
    for i in range(positions):
        rows = logits[i, :n]  # row m guesses output m + i
        paths = [text.output[: m + i] for m in range(n)]
        tokens, _ = candidates(
            rows, SamplingInput(text.sampling, prompt, text.prompt, paths, frozenset()), max(RANKS)
        )
        right = tokens == output[i : i + n, None]
        found[i] = np.where(right.any(axis=1), right.argmax(axis=1), -1)
    return found
