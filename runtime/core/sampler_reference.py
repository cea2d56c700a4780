"""Samples tokens in plain numpy: the reference for every faster sampler.

Order and meaning of the parameters are those of vLLM and of transformers' generate(): constraint,
logit_bias, the ban of min_tokens, repetition_penalty, frequency_penalty, presence_penalty; then,
above temperature 0, temperature, top_k, top_p, min_p.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from runtime.core import noise
from runtime.core.messages import Logprob
from runtime.core.sampling_params import SamplingParams

Scores = npt.NDArray[np.float32]
Allowed = npt.NDArray[np.bool_]


class GrammarState(Protocol):
    """The state of a constraint after some text. It belongs to one text.

    A text that may end allows the end-of-text tokens; a complete text allows nothing else.
    """

    def allowed(self) -> Allowed:
        """Return the mask (vocabulary,) of tokens that may follow; at least one is set.

        Raises InvalidRequest if the mask takes too long to compute.
        """
        ...

    def accept_token(self, token: int) -> None:
        """Advance by one token; an end-of-text token changes nothing.

        Raises InvalidRequest for a token that is not allowed.
        """
        ...


@dataclass(frozen=True, slots=True)
class SamplingInput:
    """Everything but the logits that a sampler needs for some rows of one session.

    The text of row i is `text`, all committed tokens, continued by `paths[i]`. The first `prompt`
    tokens of `text` are the user's. `eos` are the end-of-text tokens. `allowed` (rows, vocabulary)
    masks the tokens that a constraint leaves to each row.
    """

    sampling: SamplingParams
    prompt: int
    text: Sequence[int]
    paths: Sequence[Sequence[int]]
    eos: frozenset[int]
    allowed: Allowed | None = None

    def positions(self) -> list[int]:
        """Return, for each row, the position in its text, from 0, of the token to sample."""
        return [len(self.text) + len(path) for path in self.paths]

    def too_short(self) -> list[int]:
        """Return the rows that must not end the text yet, by min_tokens or, under a constraint,
        ignore_eos.

        A row whose constraint leaves nothing but the end may end: it has no other choice. (In vLLM
        such a text continues with one end-of-text token after another up to max_tokens.)
        """
        most = self.sampling.min_tokens
        if self.allowed is None:
            return [
                row
                for row, position in enumerate(self.positions())
                if position - self.prompt < most
            ]
        ends = sorted(self.eos)
        more = self.allowed.sum(axis=1) > self.allowed[:, ends].sum(axis=1)
        short = [
            position - self.prompt < most or self.sampling.ignore_eos
            for position in self.positions()
        ]
        return [
            row
            for row, (is_short, has_more) in enumerate(zip(short, more.tolist(), strict=True))
            if is_short and has_more
        ]


class Sampler(Protocol):
    """`reference_sample` and its equivalents: pure functions in which rows do not affect each
    other.
    """

    def __call__(self, logits: Any, inputs: SamplingInput, /) -> npt.NDArray[np.int64]:
        """Return the token (rows,) that follows each row of `logits` (rows, vocabulary).

        The logits are not modified.
        """
        ...


class LogprobScorer(Protocol):
    """`logprobs` and its equivalents."""

    def __call__(self, logits: Any, tokens: Sequence[int], k: int) -> tuple[Logprob, ...]:
        """Return the logprobs of `tokens`, one per row of `logits` (rows, vocabulary), and of the
        top `k`.

        They come from the raw logits, before constraint, bias, penalties and temperature: vLLM's
        `raw_logprobs`, its default.
        """
        ...


def reference_sample(logits: npt.ArrayLike, inputs: SamplingInput) -> npt.NDArray[np.int64]:
    """Sample from numpy logits: the argmax at temperature 0, else the argmax of scores
    plus noise.
    """
    scores = process_logits(logits, inputs)
    if inputs.sampling.temperature > 0:
        scores = scores + noise.gumbel(
            inputs.sampling.seed, inputs.positions(), np.arange(scores.shape[1])
        )
    tokens: npt.NDArray[np.int64] = scores.argmax(axis=1)
    return tokens


def logprobs(logits: npt.ArrayLike, tokens: Sequence[int], k: int) -> tuple[Logprob, ...]:
    """Compute logprobs from numpy logits."""
    scores = np.asarray(logits, dtype=np.float64)
    high = scores.max(axis=1, keepdims=True)
    logs = scores - high - np.log(np.exp(scores - high).sum(axis=1, keepdims=True))
    chosen = logs[np.arange(len(tokens)), list(tokens)]
    best = np.argsort(-logs, axis=1, kind="stable")[:, :k]
    return make_logprobs(chosen, best, np.take_along_axis(logs, best, axis=1))


def make_logprobs(
    chosen: npt.NDArray[Any], best: npt.NDArray[Any], values: npt.NDArray[Any]
) -> tuple[Logprob, ...]:
    """Combine the logprobs of chosen tokens (rows,) with the best tokens and theirs (rows, k).

    Values that rounding lifted above 0 become 0.
    """
    tops = zip(best.tolist(), np.minimum(values, 0.0).tolist(), strict=True)
    tuples = [tuple(zip(ids, logs, strict=True)) for ids, logs in tops]
    return tuple(
        Logprob(log, top) for log, top in zip(np.minimum(chosen, 0.0).tolist(), tuples, strict=True)
    )


def process_logits(logits: npt.ArrayLike, inputs: SamplingInput) -> Scores:
    """Return new scores (rows, vocabulary) whose softmax is the distribution of each row's token.

    At temperature 0 only their argmax is meaningful.
    """
    sampling, scores = inputs.sampling, np.array(logits, dtype=np.float32)
    if inputs.allowed is not None:
        scores[~inputs.allowed] = -np.inf
    for token, bias in dict(sampling.logit_bias).items():
        scores[:, token] += np.float32(bias)
    scores[np.ix_(inputs.too_short(), sorted(inputs.eos))] = -np.inf
    for row, path in zip(scores, inputs.paths, strict=True):
        text = [*inputs.text, *path]
        apply_repetition_penalty(row, text, sampling.repetition_penalty)
        apply_count_penalties(
            row, text[inputs.prompt :], sampling.frequency_penalty, sampling.presence_penalty
        )
    if sampling.temperature == 0:
        return scores
    scores /= np.float32(sampling.temperature)
    apply_top_k(scores, sampling.top_k)
    apply_top_p(scores, sampling.top_p)
    apply_min_p(scores, sampling.min_p)
    return scores


def apply_repetition_penalty(row: Scores, text: Sequence[int], penalty: float) -> None:
    """Divide positive scores, and multiply negative ones, of all tokens in the text."""
    if penalty == 1:
        return
    seen = sorted({token for token in text if token < len(row)})
    row[seen] = np.where(
        row[seen] < 0, row[seen] * np.float32(penalty), row[seen] / np.float32(penalty)
    )


def apply_count_penalties(
    row: Scores, output: Sequence[int], frequency: float, presence: float
) -> None:
    """Lower the scores of output tokens: by `frequency` per occurrence, by `presence` once."""
    if frequency == presence == 0:
        return
    times = np.bincount(np.array(output, dtype=np.int64), minlength=len(row))[: len(row)].astype(
        np.float32
    )
    row -= np.float32(frequency) * times
    row -= np.float32(presence) * (times > 0)


def apply_top_k(scores: Scores, top_k: int) -> None:
    """Mask all scores of a row below its k-th highest."""
    if 0 < top_k < scores.shape[1]:
        scores[scores < np.sort(scores, axis=1)[:, [-top_k]]] = -np.inf


def apply_top_p(scores: Scores, top_p: float) -> None:
    """Mask all but the fewest most probable tokens whose probabilities add up to `top_p`
    or more.
    """
    if top_p < 1:
        ascending = np.argsort(scores, axis=1, kind="stable")
        barred = (
            np.cumsum(np.take_along_axis(softmax(scores), ascending, axis=1), axis=1) <= 1 - top_p
        )
        barred[:, -1] = False
        scores[np.take_along_axis(barred, np.argsort(ascending, axis=1), axis=1)] = -np.inf


def apply_min_p(scores: Scores, min_p: float) -> None:
    """Mask all tokens less probable than `min_p` times the most probable token of their row."""
    if min_p > 0:
        p = softmax(scores)
        scores[p < min_p * p.max(axis=1, keepdims=True)] = -np.inf


def softmax(scores: Scores) -> npt.NDArray[np.float64]:
    """Return probabilities of scores (rows, vocabulary); each row has at least one finite score."""
    raised = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    p: npt.NDArray[np.float64] = raised / raised.sum(axis=1, keepdims=True)
    return p
