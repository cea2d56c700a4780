"""The rule of runtime.core.sampler_reference on torch tensors, through transformers' logits processors, on the device of the logits."""

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

CANDIDATE_POOL = 64  # most likely tokens among which a drafter looks for its candidates

Scores = npt.NDArray[np.float32]
Candidates = tuple[npt.NDArray[np.int32], Scores]


def choose(logits: torch.Tensor, ask: SamplingInput) -> npt.NDArray[np.int64]:
    """The Chooser of float32 torch logits (rows, vocabulary): the tokens that runtime.core.sampler_reference.choose would choose."""
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
    """The Scorer of float32 torch logits (rows, vocabulary): what runtime.core.sampler_reference.logprobs finds, but for rounding."""
    logs = logits.log_softmax(dim=-1)
    chosen = logs.gather(1, torch.tensor(tokens, dtype=torch.int64, device=logs.device)[:, None])[
        :, 0
    ]
    values, best = topk(logs, min(k, logs.shape[1])) if k else (logs[:, :0], logs[:, :0])
    return make_logprobs(chosen.cpu().numpy(), best.cpu().numpy(), values.cpu().numpy())


def shape(logits: torch.Tensor, ask: SamplingInput) -> torch.Tensor:
    """As runtime.core.sampler_reference.shape. Where nothing is to be changed, the result is `logits` itself."""
    scores = _apply_penalties(logits, ask)
    return scores if ask.sampling.temperature == 0 else _apply_filters(scores, ask.sampling)


def _apply_penalties(logits: torch.Tensor, ask: SamplingInput) -> torch.Tensor:
    """The constraint, bias, the ban of min_tokens and penalties: what counts at temperature 0 too."""
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


def candidates(
    logits: torch.Tensor, ask: SamplingInput, k: int, pool: int = CANDIDATE_POOL
) -> Candidates:
    """A drafter's guesses for what the target answers to `ask`: token ids and scores (rows, k), best first.

    At temperature 0 the k most probable tokens with the log of their probability. Above it, coupled to the target: the
    `pool` most probable tokens ranked by score / temperature + the very noise that the target will use. Their scores are
    then the log of the softmax of those sums over the pool: it falls as the lead does, and is no calibrated probability.
    The filters top_k, top_p and min_p are applied inside the pool: a token that they bar has score -inf, and so is none. `k`
    and `pool` above the vocabulary are cut to it.
    """
    return candidates_all([(logits, ask, k)], pool)[0]


def candidates_all(
    questions: Sequence[tuple[torch.Tensor, SamplingInput, int]], pool: int = CANDIDATE_POOL
) -> list[Candidates]:
    """`candidates` for each (logits, ask, k): one look at the vocabulary and one transfer for all of them."""
    if not questions:
        return []
    edited = [_apply_penalties(logits, ask) for logits, ask, _ in questions]
    scores = edited[0] if len(edited) == 1 else torch.cat(edited)
    if any(ask.sampling.temperature == 0 for _, ask, _ in questions):
        scores = scores.log_softmax(dim=-1)  # changes nothing for the others
    width = max(k if ask.sampling.temperature == 0 else max(pool, k) for _, ask, k in questions)
    best = topk(scores, min(width, scores.shape[1]))
    values, places = best[0].cpu().numpy(), best[1].cpu().numpy()
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
    """The best `k` of each row's most likely tokens `places`, whose scores `values` fall.

    total  (rows, 1)  log of the sum of exp of all scores over the temperature; looked at for top_p alone
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
    """log of the sum of exp of each row, as a column; one score at least is finite in each."""
    high = scores.max(axis=1, keepdims=True)
    total: npt.NDArray[np.float64] = high + np.log(np.exp(scores - high).sum(axis=1, keepdims=True))
    return total


def _apply_filters(scores: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Temperature above 0, then the filters, each left out where it changes nothing. None of them looks at the text."""
    chain: list[
        Callable[[torch.LongTensor, torch.Tensor], torch.Tensor]
    ] = []  # a LogitsProcessorList inspects each at each call
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
    biased: torch.Tensor = _bias(sampling.logit_bias, str(scores.device), scores.shape[1])(
        _empty_text(scores), scores
    )
    return biased


def _empty_text(scores: torch.Tensor) -> torch.LongTensor:
    """The argument of a processor that does not look at it."""
    return torch.empty((len(scores), 0), dtype=torch.int64).long()  # type: ignore[return-value]


@lru_cache(maxsize=32)
def _bias(
    pairs: tuple[tuple[int, float], ...], device: str, vocabulary: int
) -> processors.SequenceBiasLogitsProcessor:
    """Kept between steps: it fills a vector of the vocabulary's size, on the device that it is first used on."""
    return processors.SequenceBiasLogitsProcessor(
        [[[token], float(bias)] for token, bias in dict(pairs).items()]
    )


def _seen_tokens(ask: SamplingInput, vocabulary: int) -> torch.Tensor:
    """The set of tokens of each row's text, int64 (rows, n), filled up with `vocabulary`, an id that penalties skip."""
    text = np.unique(np.asarray(ask.text, dtype=np.int64))
    seen = np.full((len(ask.paths), len(text) + max(map(len, ask.paths))), vocabulary)
    seen[:, : len(text)] = text
    for row, path in zip(seen, ask.paths, strict=True):
        row[len(text) : len(text) + len(path)] = path
    return torch.from_numpy(seen)


def _token_counts(ask: SamplingInput, vocabulary: int) -> torch.Tensor:
    """How often each token stands in each row's output, float32 (rows, vocabulary)."""
    output = np.asarray(ask.text[ask.prompt :], dtype=np.int64)
    times = np.tile(
        np.bincount(output, minlength=vocabulary)[:vocabulary].astype(np.float32),
        (len(ask.paths), 1),
    )
    for row, path in zip(times, ask.paths, strict=True):
        np.add.at(row, [token for token in path if token < vocabulary], 1)
    return torch.from_numpy(times)
