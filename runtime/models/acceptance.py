"""How often a draft's first k guesses hold the token that the target chooses, on the target's own outputs."""

from collections.abc import Callable, Sequence

import numpy as np

from runtime.choice import Ask
from runtime.models.base import causal
from runtime.models.choose import candidates, choose
from runtime.models.hf import HFModel
from runtime.models.prefill import prefill
from runtime.sampling import Sampling

RANKS = (1, 2, 4, 8)


def continuation(target: HFModel, prompt: Sequence[int], sampling: Sampling, eos: frozenset[int]) -> list[int]:
    """What the target writes after `prompt`, by plain decoding, up to max_tokens or an end-of-text token (not included)."""
    cache, text = target.new_cache(), list(prompt)
    logits = prefill(target, cache, np.asarray(text))
    while True:
        token = int(choose(logits, Ask(sampling, len(prompt), text, [[]], eos))[0])
        if token in eos:
            return text[len(prompt) :]
        text.append(token)
        if len(text) - len(prompt) == sampling.max_tokens:
            return text[len(prompt) :]
        logits = target.forward(cache, causal(np.asarray([token]), cache.length))


def acceptance(
    target: HFModel,
    draft: HFModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    eos: frozenset[int],
    step: Callable[[], None] = lambda: None,
) -> dict[int, float]:
    """Share of positions, by rank k, at which the target's choice is among the draft's first k candidates.

    At temperature > 0 the candidates are coupled to the target by the noise of their position, as in the runtime. `step`
    is called after each prompt.
    """
    hits, positions = np.zeros(len(RANKS)), 0
    for prompt in prompts:
        output = continuation(target, prompt, sampling, eos)
        if output:
            text = np.asarray([*prompt, *output])
            logits = draft.forward(draft.new_cache(), causal(text[:-1], 0), last=len(output))
            paths = [output[:i] for i in range(len(output))]
            guesses, _ = candidates(logits, Ask(sampling, len(prompt), prompt, paths, frozenset()), max(RANKS))
            right = guesses == np.asarray(output)[:, None]
            hits += [right[:, :rank].any(axis=1).sum() for rank in RANKS]
            positions += len(output)
        step()
    return {rank: float(count / max(positions, 1)) for rank, count in zip(RANKS, hits, strict=True)}
