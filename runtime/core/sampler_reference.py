"""The rule by which a target chooses its tokens, in plain numpy: the oracle of every faster implementation.

Order and meaning of the parameters are those of vLLM and of transformers' generate(): the constraint, logit_bias, the ban of
min_tokens, repetition_penalty, frequency_penalty, presence_penalty; then, above temperature 0, temperature, top_k, top_p, min_p.
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
    """A constraint after some text: what that may go on with. Belongs to one text; made by what knows grammars.

    A text that may end allows the tokens that end it, and one that is complete allows no other.
    """

    def allowed(self) -> Allowed:
        """For each token (vocabulary,) whether it may follow; some may. Raises InvalidRequest where that takes too much to find out."""
        ...

    def accept_token(self, token: int) -> None:
        """The text goes on with this token; one that ends it changes nothing. Raises InvalidRequest for one that is not allowed."""
        ...


@dataclass(frozen=True, slots=True)
class SamplingInput:
    """What is asked of a chooser: the token that follows each of some rows, all of one session.

    Row i's text is `text`, all that is committed, continued by `paths[i]`. `prompt` of the tokens of `text` came from the
    user; `eos` are the token ids that end a text. `allowed` (rows, vocabulary) are the tokens that a constraint leaves each row.
    """

    sampling: SamplingParams
    prompt: int
    text: Sequence[int]
    paths: Sequence[Sequence[int]]
    eos: frozenset[int]
    allowed: Allowed | None = None

    def positions(self) -> list[int]:
        """The place in its text, from 0, of the token that each row chooses."""
        return [len(self.text) + len(path) for path in self.paths]

    def too_short(self) -> list[int]:
        """Rows that may not end the text yet, because of min_tokens or, under a constraint, of ignore_eos.

        A row that is left nothing but the end by its constraint may: there is no other token that it could choose. (In vLLM such a text
        goes on with one end after the other up to max_tokens.)
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
    """`choose` below and its twins: pure functions, of which a row's token depends on that row and its text alone."""

    def __call__(self, logits: Any, inputs: SamplingInput, /) -> npt.NDArray[np.int64]:
        """The token (rows,) that follows each row of `logits` (rows, vocabulary), which are left as they are."""
        ...


class LogprobScorer(Protocol):
    """`logprobs` below and its twins."""

    def __call__(self, logits: Any, tokens: Sequence[int], k: int) -> tuple[Logprob, ...]:
        """What the target thought of the token chosen after each row of `logits` (rows, vocabulary), and its `k` favourites there.

        From the logits as they are, before constraint, bias, penalties and temperature: vLLM's `raw_logprobs`, its default.
        """
        ...


def reference_sample(logits: npt.ArrayLike, inputs: SamplingInput) -> npt.NDArray[np.int64]:
    """The Chooser of numpy logits: argmax at temperature 0, else argmax of the scores and the noise of its position."""
    scores = process_logits(logits, inputs)
    if inputs.sampling.temperature > 0:
        scores = scores + noise.gumbel(
            inputs.sampling.seed, inputs.positions(), np.arange(scores.shape[1])
        )
    tokens: npt.NDArray[np.int64] = scores.argmax(axis=1)
    return tokens


def logprobs(logits: npt.ArrayLike, tokens: Sequence[int], k: int) -> tuple[Logprob, ...]:
    """The Scorer of numpy logits."""
    scores = np.asarray(logits, dtype=np.float64)
    high = scores.max(axis=1, keepdims=True)
    logs = scores - high - np.log(np.exp(scores - high).sum(axis=1, keepdims=True))
    chosen = logs[np.arange(len(tokens)), list(tokens)]
    best = np.argsort(-logs, axis=1, kind="stable")[:, :k]
    return make_logprobs(chosen, best, np.take_along_axis(logs, best, axis=1))


def make_logprobs(
    chosen: npt.NDArray[Any], best: npt.NDArray[Any], values: npt.NDArray[Any]
) -> tuple[Logprob, ...]:
    """Logprobs of the chosen tokens (rows,), and the best tokens with theirs (rows, k). Rounding lifts none above 0."""
    tops = zip(best.tolist(), np.minimum(values, 0.0).tolist(), strict=True)
    tuples = [tuple(zip(ids, logs, strict=True)) for ids, logs in tops]
    return tuple(
        Logprob(log, top) for log, top in zip(np.minimum(chosen, 0.0).tolist(), tuples, strict=True)
    )


def process_logits(logits: npt.ArrayLike, inputs: SamplingInput) -> Scores:
    """New scores (rows, vocabulary): softmax of them is the law of each row's token. At temperature 0 only the argmax counts."""
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
    """Divide the scores above 0, and multiply those below, of all tokens that are in the text."""
    if penalty == 1:
        return
    seen = sorted({token for token in text if token < len(row)})
    row[seen] = np.where(
        row[seen] < 0, row[seen] * np.float32(penalty), row[seen] / np.float32(penalty)
    )


def apply_count_penalties(
    row: Scores, output: Sequence[int], frequency: float, presence: float
) -> None:
    """Lower the scores of the output's tokens: `frequency` for each occurrence, `presence` once."""
    if frequency == presence == 0:
        return
    times = np.bincount(np.array(output, dtype=np.int64), minlength=len(row))[: len(row)].astype(
        np.float32
    )
    row -= np.float32(frequency) * times
    row -= np.float32(presence) * (times > 0)


def apply_top_k(scores: Scores, top_k: int) -> None:
    """Bar all scores of a row below its k-th highest."""
    if 0 < top_k < scores.shape[1]:
        scores[scores < np.sort(scores, axis=1)[:, [-top_k]]] = -np.inf


def apply_top_p(scores: Scores, top_p: float) -> None:
    """Bar all but the fewest most probable tokens of a row whose probabilities add up to `top_p` or more."""
    if top_p < 1:
        ascending = np.argsort(scores, axis=1, kind="stable")
        barred = (
            np.cumsum(np.take_along_axis(softmax(scores), ascending, axis=1), axis=1) <= 1 - top_p
        )
        barred[:, -1] = False
        scores[np.take_along_axis(barred, np.argsort(ascending, axis=1), axis=1)] = -np.inf


def apply_min_p(scores: Scores, min_p: float) -> None:
    """Bar all tokens less probable than `min_p` times the most probable of their row."""
    if min_p > 0:
        p = softmax(scores)
        scores[p < min_p * p.max(axis=1, keepdims=True)] = -np.inf


def softmax(scores: Scores) -> npt.NDArray[np.float64]:
    """Probabilities of scores (rows, vocabulary), of which one at least in each row is finite."""
    raised = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    p: npt.NDArray[np.float64] = raised / raised.sum(axis=1, keepdims=True)
    return p
