"""Log-probabilities are those of the raw logits; draft candidates follow the sampler."""

import numpy as np
import pytest
import torch

from runtime.core import sampler_reference
from runtime.core.sampler_reference import LogprobScorer
from runtime.models import sampler as fast
from tests.support.sampling import ask, build, some_logits

SCORERS: dict[str, LogprobScorer] = {
    "numpy": sampler_reference.logprobs,
    "torch": lambda logits, tokens, k: fast.logprobs(torch.as_tensor(logits), tokens, k),
}


@pytest.mark.parametrize("scorer", SCORERS.values(), ids=list(SCORERS))
@pytest.mark.parametrize(("vocabulary", "k"), [(5, 0), (5, 3), (5, 20), (3000, 20)])
def test_logprobs_are_those_of_the_logits_as_they_are(
    scorer: LogprobScorer, vocabulary: int, k: int
) -> None:
    logits = some_logits(3, vocabulary)
    expected = logits.double().log_softmax(dim=-1)
    found = scorer(logits.numpy(), [1, 4, 2], k)
    assert [one.chosen for one in found] == pytest.approx(
        [float(expected[row, token]) for row, token in enumerate([1, 4, 2])], abs=1e-5
    )
    best = expected.topk(min(k, vocabulary), dim=-1)
    assert [[token for token, _ in one.top] for one in found] == best.indices.tolist()
    for one, values in zip(found, best.values.tolist(), strict=True):
        assert [value for _, value in one.top] == pytest.approx(values, abs=1e-5)
        assert max([one.chosen, *(value for _, value in one.top)]) <= 0.0


@pytest.mark.parametrize("scorer", SCORERS.values(), ids=list(SCORERS))
def test_a_certain_token_has_logprob_0_and_an_impossible_one_the_lowest(
    scorer: LogprobScorer,
) -> None:
    (found,) = scorer(np.array([[-np.inf, 60.0, -60.0]], dtype=np.float32), [1], 3)
    assert found.chosen == 0.0
    assert [token for token, _ in found.top] == [1, 2, 0]
    assert found.top[2][1] == -np.inf


def test_candidates_at_temperature_0_are_the_most_probable() -> None:
    logits = some_logits(5, 300)
    tokens, scores = fast.candidates(logits, ask(build(logit_bias=((7, 50.0),)), [[]] * 5), 4)
    logits[:, 7] += 50
    expected = logits.log_softmax(dim=-1).topk(4)
    assert tokens.dtype == np.int32
    assert scores.dtype == np.float32
    assert np.array_equal(tokens, expected.indices.numpy())
    assert np.allclose(scores, expected.values.numpy(), atol=1e-5)
    assert (tokens[:, 0] == 7).all()
    assert (scores <= 0).all()


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"top_k": 9},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 30, "top_p": 0.9, "logit_bias": ((3, 4.0),)},
        {"repetition_penalty": 1.5, "presence_penalty": 1.0},
    ],
    ids=str,
)
def test_the_first_candidate_of_a_perfect_drafter_is_the_choice(
    parameters: dict[str, object],
) -> None:
    logits, sampling = some_logits(200, 300), build(temperature=0.8, seed=4, **parameters)
    question = ask(sampling, [[1] * length for length in range(200)])
    tokens, scores = fast.candidates(logits, question, 5, pool=300)
    assert tokens[:, 0].tolist() == fast.choose(logits, question).tolist()
    assert (scores[:, 1:] <= scores[:, :-1]).all()
    shaped = fast.shape(logits, question).numpy()
    assert np.array_equal(
        np.isinf(scores), np.isinf(np.take_along_axis(shaped, tokens.astype(np.int64), axis=1))
    )


def test_scores_of_candidates_are_shares_of_the_pool() -> None:
    _, scores = fast.candidates(
        some_logits(6, 40), ask(build(temperature=1.0), [[1] * i for i in range(6)]), 10, pool=10
    )
    assert np.allclose(np.exp(scores).sum(axis=1), 1, atol=1e-5)


def test_more_candidates_than_tokens() -> None:
    for temperature in (0.0, 1.0):
        tokens, _ = fast.candidates(
            some_logits(2, 3), ask(build(temperature=temperature), [[], [1]]), 8
        )
        assert np.sort(tokens, axis=1).tolist() == [[0, 1, 2]] * 2
