"""Measures how often a draft's first k guesses contain the target's choice, on the target's
outputs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.core.sampler_reference import SamplingInput
from runtime.core.sampling_params import SamplingParams
from runtime.models.base import causal
from runtime.models.hf import HFModel
from runtime.models.prefill import prefill
from runtime.models.sampler import candidates, choose

RANKS = (1, 2, 4, 8)


def continuation(
    target: HFModel, prompt: Sequence[int], sampling: SamplingParams, eos: frozenset[int]
) -> list[int]:
    """Decode plainly after `prompt`, up to max_tokens or an end-of-text token (not included)."""
    cache, text = target.new_cache(), list(prompt)
    logits = prefill(target, cache, np.asarray(text))
    while True:
        token = int(choose(logits, SamplingInput(sampling, len(prompt), text, [[]], eos))[0])
        if token in eos:
            return text[len(prompt) :]
        text.append(token)
        if len(text) - len(prompt) == sampling.max_tokens:
            return text[len(prompt) :]
        logits = target.forward(cache, causal(np.asarray([token]), cache.length))


@dataclass(frozen=True, slots=True)
class Replay:
    """A draft's guesses at the positions of a target's texts, in order.

    ranks   int64 (n,): rank of the target's choice among the guesses, from 0; -1 if it is not there
    scores  float32 (n, k): log probabilities of the guesses, falling along a row
    """

    ranks: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]

    def rates(self) -> dict[int, float]:
        """Return for each k the share of the positions whose first k guesses contain the target's
        choice.
        """
        found = self.ranks[self.ranks >= 0]
        return {k: float((found < k).sum() / max(1, len(self.ranks))) for k in RANKS}


def replay_draft(
    draft: HFModel, texts: Iterable[tuple[Sequence[int], Sequence[int]]], sampling: SamplingParams
) -> Replay:
    """Run the draft along prompts and the target's outputs.

    Above temperature 0 the guesses are coupled to the target by the noise of their position, as in
    the runtime.
    """
    ranks, scores = [np.zeros(0, np.int64)], [np.zeros((0, max(RANKS)), np.float32)]
    for prompt, output in texts:
        if output:
            text = np.asarray([*prompt, *output])
            text = np.where(text < draft.vocabulary, text, 0)  # it may lack tokens of the target
            logits = draft.forward(draft.new_cache(), causal(text[:-1], 0), last=len(output))
            paths = [output[:i] for i in range(len(output))]
            guesses, said = candidates(
                logits, SamplingInput(sampling, len(prompt), prompt, paths, frozenset()), max(RANKS)
            )
            right = guesses == np.asarray(output)[:, None]
            ranks.append(np.where(right.any(axis=1), right.argmax(axis=1), -1))
            scores.append(said)
    return Replay(np.concatenate(ranks), np.concatenate(scores))


def acceptance(
    target: HFModel,
    draft: HFModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    eos: frozenset[int],
    step: Callable[[], None] = lambda: None,
) -> dict[int, float]:
    """Return the rates on the target's own continuations of `prompts`; `step` runs after each
    prompt.
    """

    def texts() -> Iterator[tuple[Sequence[int], Sequence[int]]]:
        for prompt in prompts:
            yield prompt, continuation(target, prompt, sampling, eos)
            step()

    return replay_draft(draft, texts(), sampling).rates()
