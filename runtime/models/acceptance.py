"""How often a draft's first k guesses hold the token that the target chooses, on the target's own outputs."""

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
    """What the target writes after `prompt`, by plain decoding, up to max_tokens or an end-of-text token (not included)."""
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

    ranks   int64 (n,)  place of the target's choice among the guesses of its position, from 0; -1 where it is not there
    scores  float32 (n, k)  logs of the probabilities that the draft gives to its guesses, falling along a row
    """

    ranks: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]

    def rates(self) -> dict[int, float]:
        """Share of the positions, by number k of guesses, at which the target's choice is among the first k."""
        found = self.ranks[self.ranks >= 0]
        return {k: float((found < k).sum() / max(1, len(self.ranks))) for k in RANKS}


def replay_draft(
    draft: HFModel, texts: Iterable[tuple[Sequence[int], Sequence[int]]], sampling: SamplingParams
) -> Replay:
    """What the draft guesses along prompts and what a target answered to each.

    At temperature > 0 the guesses are coupled to the target by the noise of their position, as in the runtime.
    """
    ranks, scores = [np.zeros(0, np.int64)], [np.zeros((0, max(RANKS)), np.float32)]
    for prompt, output in texts:
        if output:
            text = np.asarray([*prompt, *output])
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
    """The rates along the target's own continuations of `prompts`. `step` is called after each of them."""

    def texts() -> Iterator[tuple[Sequence[int], Sequence[int]]]:
        for prompt in prompts:
            yield prompt, continuation(target, prompt, sampling, eos)
            step()

    return replay_draft(draft, texts(), sampling).rates()
