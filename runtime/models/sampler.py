"""Implements runtime.core.sampler_reference with torch tensors, on the device of the logits.

It uses transformers' logits processors.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from math import inf, log

import numpy as np
import numpy.typing as npt
import torch
from transformers.generation import logits_process as processors

from runtime.core import noise
from runtime.core.messages import Logprob
from runtime.core.sampler_reference import SamplingInput, make_logprobs
from runtime.core.sampling_params import SamplingParams
from runtime.kernels.topk import topk

CANDIDATE_POOL = 64  # most likely tokens that a drafter ranks

Scores = npt.NDArray[np.float32]
Candidates = tuple[npt.NDArray[np.int32], Scores]


def choose(logits: torch.Tensor, ask: SamplingInput) -> npt.NDArray[np.int64]:
    """Implement the Chooser for float32 torch logits, see sampler_reference.choose."""
    scores, seed = shape(logits, ask), ask.sampling.seed
    if ask.sampling.temperature > 0 and scores.device.type == "cpu":
        return noise.gumbel_argmax(scores.numpy(), seed, ask.positions())
    if ask.sampling.temperature > 0:
        scores = scores + noise.gumbel(
            seed, ask.positions(), torch.arange(scores.shape[1], device=scores.device), torch
        )
    chosen: npt.NDArray[np.int64] = scores.argmax(dim=-1).cpu().numpy()
    return chosen


def logprobs(logits: torch.Tensor, tokens: Sequence[int], k: int) -> tuple[Logprob, ...]:
    """Implement the Scorer for float32 torch logits (rows, vocabulary), equal up to rounding."""
    logs = logits.log_softmax(dim=-1)
    chosen = logs.gather(1, torch.tensor(tokens, dtype=torch.int64, device=logs.device)[:, None])[
        :, 0
    ]
    values, best = topk(logs, min(k, logs.shape[1])) if k else (logs[:, :0], logs[:, :0])
    return make_logprobs(chosen.cpu().numpy(), best.cpu().numpy(), values.cpu().numpy())


def shape(logits: torch.Tensor, ask: SamplingInput) -> torch.Tensor:
    """Implement sampler_reference.shape; returns `logits` itself if nothing changes."""
    scores = _apply_penalties(logits, ask)
    return scores if ask.sampling.temperature == 0 else _apply_filters(scores, ask.sampling)


def _apply_penalties(logits: torch.Tensor, ask: SamplingInput) -> torch.Tensor:
    """Apply what counts at temperature 0 too: constraint, bias, min_tokens and penalties."""
    sampling, scores = ask.sampling, logits
    if ask.allowed is not None:
        scores = scores.masked_fill(torch.from_numpy(~ask.allowed).to(scores.device), -inf)
    if sampling.logit_bias:
        scores = _apply_bias(scores, sampling)
    if short := ask.too_short():
        scores = scores.clone()
        scores[
            torch.tensor(short)[:, None], torch.tensor(sorted(ask.eos), dtype=torch.int64)
        ] = -inf
    if sampling.repetition_penalty != 1:
        texts = _seen_tokens(ask, scores.shape[1]).to(scores.device)
        scores = processors.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))(
            texts, scores
        )
    if sampling.frequency_penalty or sampling.presence_penalty:
        times = _token_counts(ask, scores.shape[1]).to(scores.device)
        scores = (
            scores - sampling.frequency_penalty * times - sampling.presence_penalty * (times > 0)
        )
    return scores


def edits_logits(sampling: SamplingParams) -> bool:
    """Return whether logits of single tokens are edited: by a bias or a penalty."""
    return bool(
        sampling.logit_bias
        or sampling.repetition_penalty != 1
        or sampling.frequency_penalty
        or sampling.presence_penalty
    )


def candidates(
    logits: torch.Tensor, ask: SamplingInput, k: int, pool: int = CANDIDATE_POOL
) -> Candidates:
    """Return a drafter's guesses for the target's choice: ids and scores (rows, k), best first.

    At temperature 0 they are the k most probable tokens with their log probabilities. Above it they
    are coupled to the target: the `pool` most probable tokens are ranked by score / temperature +
    the target's own noise. Their scores are the log softmax of those sums over the pool, which
    falls with the lead and is not a calibrated probability. The filters top_k, top_p and min_p
    apply inside the pool; a filtered token has score -inf and is no guess. `k` and `pool` are
    limited to the vocabulary.
    """
    return candidates_all([(logits, ask, k)], pool)[0]


def candidates_all(
    questions: Sequence[tuple[torch.Tensor, SamplingInput, int]],
    pool: int = CANDIDATE_POOL,
    ids: npt.NDArray[np.int64] | None = None,
) -> list[Candidates]:
    """Return `candidates` of several (logits, input, k) with one pass over the vocabulary and one
    transfer.

    With `ids`, the token ids of their columns, the logits cover a part of the vocabulary; no input
    may then edit logits, see `edits_logits`.
    """
    if not questions:
        return []
    edited = [_apply_penalties(logits, ask) for logits, ask, _ in questions]
    scores = edited[0] if len(edited) == 1 else torch.cat(edited)
    if any(ask.sampling.temperature == 0 for _, ask, _ in questions):
        scores = scores.log_softmax(dim=-1)  # does not change the result of the others
    width = max(k if ask.sampling.temperature == 0 else max(pool, k) for _, ask, k in questions)
    best = topk(scores, min(width, scores.shape[1]))
    values, places = best[0].cpu().numpy(), best[1].cpu().numpy()
    if ids is not None:
        places = ids[places]
    totals = np.zeros((len(values), 1), dtype=np.float32)
    if any(ask.sampling.temperature > 0 and ask.sampling.top_p < 1 for _, ask, _ in questions):
        temperatures = [
            ask.sampling.temperature or 1.0
            for logits, ask, _ in questions
            for _ in range(len(logits))
        ]
        totals = (
            (scores / scores.new_tensor(temperatures)[:, None])
            .logsumexp(dim=-1, keepdim=True)
            .cpu()
            .numpy()
        )
    ends = accumulate(len(logits) for logits, _, _ in questions)
    rows = [
        slice(end - len(logits), end) for end, (logits, _, _) in zip(ends, questions, strict=True)
    ]
    return [
        rank_candidates(values[of], places[of], totals[of], ask, k, pool)
        for of, (_, ask, k) in zip(rows, questions, strict=True)
    ]


def rank_candidates(
    values: Scores,
    places: npt.NDArray[np.int64],
    total: Scores,
    ask: SamplingInput,
    k: int,
    pool: int,
) -> Candidates:
    """Return the best `k` of each row's most likely tokens `places`, whose scores `values` fall.

    total  (rows, 1): log of the sum of exp of all scores over the temperature; used for top_p only
    """
    sampling = ask.sampling
    if sampling.temperature == 0:
        return places[:, :k].astype(np.int32), np.minimum(values[:, :k], 0)
    width = max(pool, k)
    tokens, kept = places[:, :width], values[:, :width].astype(np.float64) / sampling.temperature
    if sampling.top_k:
        kept[:, sampling.top_k :] = -inf
    if sampling.top_p < 1:
        within = 0 < sampling.top_k <= kept.shape[1]
        probability = np.exp(kept - (_logsumexp(kept) if within else total))
        kept[:, 1:][(np.cumsum(probability, axis=1) - probability >= sampling.top_p)[:, 1:]] = -inf
    if sampling.min_p:
        kept[kept < kept[:, :1] + log(sampling.min_p)] = -inf
    perturbed = kept + noise.approx_gumbel(sampling.seed, ask.positions(), tokens)
    rows, order = (
        np.arange(len(tokens))[:, None],
        np.argsort(-perturbed, axis=1, kind="stable")[:, :k],
    )
    shares = (perturbed - _logsumexp(perturbed))[rows, order]
    return tokens[rows, order].astype(np.int32), np.minimum(shares, 0).astype(np.float32)


def _logsumexp(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return log sum exp of each row as a column; each row has a finite score."""
    high = scores.max(axis=1, keepdims=True)
    total: npt.NDArray[np.float64] = high + np.log(np.exp(scores - high).sum(axis=1, keepdims=True))
    return total


def _apply_filters(scores: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Apply a temperature above 0 and the filters, skipping those without effect."""
    chain: list[
        Callable[[torch.LongTensor, torch.Tensor], torch.Tensor]
    ] = []  # a LogitsProcessorList would inspect each processor at every call
    if sampling.temperature != 1:
        chain.append(processors.TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        chain.append(processors.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(processors.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(processors.MinPLogitsWarper(sampling.min_p))
    if chain:
        text = _empty_text(scores)
        for processor in chain:
            scores = processor(text, scores)
    return scores


def _apply_bias(scores: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    # A draft may lack tokens of the target.
    pairs = tuple(pair for pair in sampling.logit_bias if pair[0] < scores.shape[1])
    if not pairs:
        return scores
    biased: torch.Tensor = _bias(pairs, str(scores.device), scores.shape[1])(
        _empty_text(scores), scores
    )
    return biased


def _empty_text(scores: torch.Tensor) -> torch.LongTensor:
    """Return the text argument of a processor that ignores it."""
    return torch.empty((len(scores), 0), dtype=torch.int64).long()  # type: ignore[return-value]


@lru_cache(maxsize=32)
def _bias(
    pairs: tuple[tuple[int, float], ...], device: str, vocabulary: int
) -> processors.SequenceBiasLogitsProcessor:
    """Return a processor that is cached between steps.

    It fills a vector of the vocabulary's size, on the device of its first use.
    """
    return processors.SequenceBiasLogitsProcessor(
        [[[token], float(bias)] for token, bias in dict(pairs).items()]
    )


def _seen_tokens(ask: SamplingInput, vocabulary: int) -> torch.Tensor:
    """Return the set of tokens of each row's text, int64 (rows, n), padded with `vocabulary`.

    Penalties skip that id.
    """
    text = np.unique(np.asarray(ask.text, dtype=np.int64))
    seen = np.full((len(ask.paths), len(text) + max(map(len, ask.paths))), vocabulary)
    seen[:, : len(text)] = text
    for row, path in zip(seen, ask.paths, strict=True):
        row[len(text) : len(text) + len(path)] = path
    return torch.from_numpy(np.minimum(seen, vocabulary))


def _token_counts(ask: SamplingInput, vocabulary: int) -> torch.Tensor:
    """Return how often each token occurs in each row's output, float32 (rows, vocabulary)."""
    output = np.asarray(ask.text[ask.prompt :], dtype=np.int64)
    times = np.tile(
        np.bincount(output, minlength=vocabulary)[:vocabulary].astype(np.float32),
        (len(ask.paths), 1),
    )
    for row, path in zip(times, ask.paths, strict=True):
        np.add.at(row, [token for token in path if token < vocabulary], 1)
    return torch.from_numpy(times)
