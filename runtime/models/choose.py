"""The rule of runtime.choice on torch tensors, through transformers' logits processors, on the device of the logits."""

from functools import lru_cache
from math import inf, log

import numpy as np
import numpy.typing as npt
import torch
from transformers.generation import logits_process as processors

from runtime import noise
from runtime.choice import Ask
from runtime.sampling import Sampling

POOL = 64  # most likely tokens among which a drafter looks for its candidates


def choose(logits: torch.Tensor, ask: Ask) -> npt.NDArray[np.int64]:
    """The Chooser of float32 torch logits (rows, vocabulary): the tokens that runtime.choice.choose would choose."""
    scores, seed = shape(logits, ask), ask.sampling.seed
    if ask.sampling.temperature > 0 and scores.device.type == "cpu":
        return noise.argmax(scores.numpy(), seed, ask.positions())
    if ask.sampling.temperature > 0:
        scores = scores + noise.gumbel(seed, ask.positions(), torch.arange(scores.shape[1], device=scores.device), torch)
    chosen: npt.NDArray[np.int64] = scores.argmax(dim=-1).cpu().numpy()
    return chosen


def shape(logits: torch.Tensor, ask: Ask) -> torch.Tensor:
    """As runtime.choice.shape. Where nothing is to be changed, the result is `logits` itself."""
    scores = _edited(logits, ask)
    return scores if ask.sampling.temperature == 0 else _warped(scores, ask.sampling)


def _edited(logits: torch.Tensor, ask: Ask) -> torch.Tensor:
    """Bias, the ban of min_tokens and penalties: what counts at temperature 0 too."""
    sampling, scores = ask.sampling, logits
    if sampling.logit_bias:
        scores = _biased(scores, sampling)
    if short := ask.too_short():
        scores = scores.clone()
        scores[torch.tensor(short)[:, None], torch.tensor(sorted(ask.eos), dtype=torch.int64)] = -inf
    if sampling.repetition_penalty != 1:
        texts = _seen(ask, scores.shape[1]).to(scores.device)
        scores = processors.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))(texts, scores)
    if sampling.frequency_penalty or sampling.presence_penalty:
        times = _times(ask, scores.shape[1]).to(scores.device)
        scores = scores - sampling.frequency_penalty * times - sampling.presence_penalty * (times > 0)
    return scores


def candidates(logits: torch.Tensor, ask: Ask, k: int, pool: int = POOL) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """A drafter's guesses for what the target answers to `ask`: token ids and scores (rows, k), best first.

    At temperature 0 the k most probable tokens with the log of their probability. Above it, coupled to the target: the
    `pool` most probable tokens ranked by score / temperature + the very noise that the target will use. Their scores are
    then the log of the softmax of those sums over the pool: it falls as the lead does, and is no calibrated probability.
    The filters top_k, top_p and min_p are applied inside the pool: a token that they bar has score -inf, and so is none. `k`
    and `pool` above the vocabulary are cut to it.
    """
    sampling, scores = ask.sampling, _edited(logits, ask)
    if sampling.temperature == 0:
        top = scores.topk(min(k, scores.shape[1]), dim=-1)
        likely = (top.values - scores.logsumexp(dim=-1, keepdim=True)).clamp(max=0.0)
        return top.indices.int().cpu().numpy(), likely.cpu().numpy()
    top = scores.topk(min(max(pool, k), scores.shape[1]), dim=-1)
    tokens, kept = top.indices.cpu().numpy(), (top.values / sampling.temperature).double().cpu().numpy()
    if sampling.top_k:
        kept[:, sampling.top_k :] = -inf
    if sampling.top_p < 1:
        all_tokens = (scores / sampling.temperature).logsumexp(dim=-1, keepdim=True).cpu().numpy()
        total = _logsumexp(kept) if 0 < sampling.top_k <= kept.shape[1] else all_tokens
        probability = np.exp(kept - total)
        kept[:, 1:][(np.cumsum(probability, axis=1) - probability >= sampling.top_p)[:, 1:]] = -inf
    if sampling.min_p:
        kept[kept < kept[:, :1] + log(sampling.min_p)] = -inf
    perturbed = kept + noise.gumbel(sampling.seed, ask.positions(), tokens)
    order = np.argsort(-perturbed, axis=1, kind="stable")[:, :k]
    shares = np.take_along_axis(perturbed - _logsumexp(perturbed), order, axis=1)
    return np.take_along_axis(tokens, order, axis=1).astype(np.int32), shares.clip(max=0).astype(np.float32)


def _logsumexp(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """log of the sum of exp of each row, as a column; one score at least is finite in each."""
    high = scores.max(axis=1, keepdims=True)
    total: npt.NDArray[np.float64] = high + np.log(np.exp(scores - high).sum(axis=1, keepdims=True))
    return total


def _warped(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Temperature above 0, then the filters, each left out where it changes nothing. None of them looks at the text."""
    chain = processors.LogitsProcessorList()
    if sampling.temperature != 1:
        chain.append(processors.TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        chain.append(processors.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(processors.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(processors.MinPLogitsWarper(sampling.min_p))
    shaped: torch.Tensor = chain(_no_text(scores), scores)
    return shaped


def _biased(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    biased: torch.Tensor = _bias(sampling.logit_bias, str(scores.device), scores.shape[1])(_no_text(scores), scores)
    return biased


def _no_text(scores: torch.Tensor) -> torch.LongTensor:
    """The argument of a processor that does not look at it."""
    return torch.empty((len(scores), 0), dtype=torch.int64).long()  # type: ignore[return-value]


@lru_cache(maxsize=32)
def _bias(pairs: tuple[tuple[int, float], ...], device: str, vocabulary: int) -> processors.SequenceBiasLogitsProcessor:
    """Kept between steps: it fills a vector of the vocabulary's size, on the device that it is first used on."""
    return processors.SequenceBiasLogitsProcessor([[[token], float(bias)] for token, bias in dict(pairs).items()])


def _seen(ask: Ask, vocabulary: int) -> torch.Tensor:
    """The set of tokens of each row's text, int64 (rows, n), filled up with `vocabulary`, an id that penalties skip."""
    text = np.unique(np.asarray(ask.text, dtype=np.int64))
    seen = np.full((len(ask.paths), len(text) + max(map(len, ask.paths))), vocabulary)
    seen[:, : len(text)] = text
    for row, path in zip(seen, ask.paths, strict=True):
        row[len(text) : len(text) + len(path)] = path
    return torch.from_numpy(seen)


def _times(ask: Ask, vocabulary: int) -> torch.Tensor:
    """How often each token stands in each row's output, float32 (rows, vocabulary)."""
    output = np.asarray(ask.text[ask.prompt :], dtype=np.int64)
    times = np.tile(np.bincount(output, minlength=vocabulary)[:vocabulary].astype(np.float32), (len(ask.paths), 1))
    for row, path in zip(times, ask.paths, strict=True):
        np.add.at(row, [token for token in path if token < vocabulary], 1)
    return torch.from_numpy(times)
