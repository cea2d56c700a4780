"""The numpy and torch samplers follow the exact law and agree with each other and transformers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import exp

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from runtime.core import noise, sampler_reference
from runtime.core.sampler_reference import Sampler, SamplingInput
from runtime.core.sampling_params import SamplingParams
from runtime.models import sampler as fast
from tests.support.sampling import EOS, ask, build, some_logits

CHOOSERS: dict[str, Sampler] = {
    "numpy": sampler_reference.reference_sample,
    "torch": lambda logits, ask: fast.choose(torch.as_tensor(logits), ask),
}
DRAWS = 100_000
ROWS = 500  # of one call
LOGITS = np.array([1.5, 0.3, -0.7, 2.0, 0.0, -2.5, 1.1, 0.9, -0.2, 1.5], dtype=np.float32)

Tokens = npt.NDArray[np.int64]
chooser = pytest.mark.parametrize("choose", CHOOSERS.values(), ids=list(CHOOSERS))


def constrained(
    sampling: SamplingParams, paths: list[list[int]], allowed: npt.NDArray[np.bool_]
) -> SamplingInput:
    return replace(ask(sampling, paths), allowed=allowed)


def law(
    temperature: float, top_k: float = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[float]:
    """Computes the exact law of LOGITS: sort by probability, apply three filters, renormalise."""
    weight = {
        token: exp(logit / temperature) for token, logit in enumerate(LOGITS.astype(float).tolist())
    }
    order = sorted(weight, key=lambda token: -weight[token])
    if top_k:
        weakest = weight[order[int(top_k) - 1]]
        order = [token for token in order if weight[token] >= weakest]
    total, above, kept = sum(weight[token] for token in order), 0.0, []
    for token in order:
        if above / total < top_p and weight[token] >= min_p * weight[order[0]]:
            kept.append(token)
        above += weight[token]
    total = sum(weight[token] for token in kept)
    return [weight[token] / total if token in kept else 0.0 for token in range(len(LOGITS))]


def chi_square(observed: Tokens, probability: list[float]) -> float:
    """Probability of a deviation at least this large; 0 where something impossible was observed."""
    p = np.array(probability)
    if observed[p == 0].any():
        return 0.0
    expected = p[p > 0] * observed.sum()
    statistic = float(((observed[p > 0] - expected) ** 2 / expected).sum())
    return float(
        torch.special.gammaincc(
            torch.tensor((len(expected) - 1) / 2).double(), torch.tensor(statistic / 2).double()
        )
    )


def seeds() -> Iterator[int]:
    return iter(range(DRAWS // ROWS))


LAWS = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.3, "top_k": 4},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.2, "top_k": 6, "top_p": 0.9, "min_p": 0.2},
]


@chooser
@pytest.mark.parametrize("parameters", LAWS, ids=str)
def test_the_law(choose: Sampler, parameters: dict[str, float]) -> None:
    paths, logits = [[4] * length for length in range(ROWS)], np.tile(LOGITS, (ROWS, 1))
    drawn = np.concatenate(
        [choose(logits, ask(build(seed=seed, **parameters), paths)) for seed in seeds()]
    )
    assert chi_square(np.bincount(drawn, minlength=len(LOGITS)), law(**parameters)) >= 1e-6


def drawn_from(logits: npt.NDArray[np.float32], seed: int, positions: Sequence[int]) -> Tokens:
    tokens: Tokens = (logits + noise.gumbel(seed, positions, np.arange(len(logits)))).argmax(axis=1)
    return tokens


def wrong_resampled(seed: int, positions: range) -> Tokens:
    """Is wrong: keeps a confirmed guess, and samples again instead of taking the choice."""
    guess, first, second = (
        drawn_from(LOGITS, seed + shift, positions) for shift in (10**6, 0, 2 * 10**6)
    )
    return np.where(guess == first, guess, second)


def wrong_same_noise(seed: int, positions: range) -> Tokens:
    """The noise of the first position at all positions."""
    return drawn_from(LOGITS, seed, [0] * len(positions))


def wrong_truncated(seed: int, positions: range) -> Tokens:
    """Only the tokens that a draft of eight would name."""
    cut = np.where(np.sort(LOGITS)[-8] <= LOGITS, LOGITS, -np.inf)
    return drawn_from(cut, seed, positions)


def wrong_spread(seed: int, positions: range) -> Tokens:
    """Noise that is 3 % too wide."""
    return drawn_from(LOGITS / 1.03, seed, positions)


@pytest.mark.parametrize("rule", [wrong_resampled, wrong_same_noise, wrong_truncated, wrong_spread])
def test_a_wrong_rule_is_caught(rule: Callable[[int, range], Tokens]) -> None:
    drawn = np.concatenate([rule(seed, range(ROWS)) for seed in seeds()])
    assert chi_square(np.bincount(drawn, minlength=len(LOGITS)), law(1.0)) < 1e-6


def some_sampling(rng: np.random.Generator) -> SamplingParams:
    """Any mix of parameters, each switched off half of the time."""

    def perhaps(value: float, off: float) -> float:
        return value if rng.random() < 0.5 else off

    return SamplingParams(
        temperature=perhaps(float(rng.uniform(0.3, 2.0)), 0.0),
        top_k=int(perhaps(int(rng.integers(1, 60)), 0)),
        top_p=perhaps(float(rng.uniform(0.3, 0.99)), 1.0),
        min_p=perhaps(float(rng.uniform(0.0, 0.2)), 0.0),
        repetition_penalty=perhaps(float(rng.uniform(0.7, 1.5)), 1.0),
        presence_penalty=perhaps(float(rng.uniform(-1.0, 1.0)), 0.0),
        frequency_penalty=perhaps(float(rng.uniform(-1.0, 1.0)), 0.0),
        logit_bias=tuple(
            (int(t), float(b))
            for t, b in zip(rng.integers(0, 50, 3), rng.uniform(-5, 5, 3), strict=True)
        )
        * int(perhaps(1, 0)),
        seed=int(rng.integers(-(2**62), 2**62)),
        min_tokens=int(perhaps(5, 0)),
    )


@pytest.mark.parametrize("number", range(60))
def test_numpy_and_torch_agree_and_rows_do_not_touch_each_other(number: int) -> None:
    rng = np.random.default_rng(number)
    sampling, text = some_sampling(rng), tuple(rng.integers(0, 50, 12).tolist())
    paths = [rng.integers(0, 50, length).tolist() for length in rng.integers(0, 6, 9)]
    logits = torch.from_numpy(rng.standard_normal((9, 50)).astype(np.float32) * 3)
    before, question = logits.clone(), ask(sampling, paths, text, prompt=9)
    together = fast.choose(logits, question)
    assert together.dtype == np.int64
    assert (
        together.tolist() == sampler_reference.reference_sample(logits.numpy(), question).tolist()
    )
    assert together.tolist() == [
        fast.choose(logits[row : row + 1], ask(sampling, [paths[row]], text, 9))[0]
        for row in range(9)
    ]
    for row, path in enumerate(paths):  # a path that is committed already is the same text
        assert (
            together[row]
            == fast.choose(logits[row : row + 1], ask(sampling, [[]], (*text, *path), 9))[0]
        )
    assert torch.equal(logits, before)
    shaped, twin = (
        fast.shape(logits, question).numpy(),
        sampler_reference.process_logits(logits.numpy(), question),
    )
    assert np.array_equal(np.isinf(shaped), np.isinf(twin))
    assert np.allclose(shaped, twin, atol=1e-5)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, initializer_range=0.7,
        bos_token_id=1, eos_token_id=sorted(EOS), pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


GENERATE: list[dict[str, object]] = [
    {"temperature": 0.7},
    {"top_k": 7},
    {"top_p": 0.6},
    {"min_p": 0.1},
    {"repetition_penalty": 1.4},
    {"logit_bias": ((4, 2.5), (9, -3.0))},
    {"min_tokens": 5},
    {
        "temperature": 1.7,
        "top_k": 20,
        "top_p": 0.8,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "logit_bias": ((4, 2.5),),
        "min_tokens": 4,
    },
    {"temperature": 0.0, "repetition_penalty": 0.8, "logit_bias": ((7, 4.0),), "min_tokens": 4},
]


@pytest.mark.parametrize("parameters", GENERATE, ids=str)
def test_the_scores_are_those_of_generate(
    model: LlamaForCausalLM, parameters: dict[str, object]
) -> None:
    sampling, prompt = build(**{"temperature": 1.0, **parameters}), [5, 6, 5, 9]
    torch.manual_seed(1)
    made = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones((1, 4), dtype=torch.int64),
        max_new_tokens=8,
        do_sample=sampling.temperature > 0,
        temperature=sampling.temperature or None,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p or None,
        repetition_penalty=sampling.repetition_penalty,
        sequence_bias=[[[token], bias] for token, bias in sampling.logit_bias] or None,
        min_new_tokens=sampling.min_tokens or None,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    text = made.sequences[0].tolist()
    assert made.scores
    for step, (logits, scores) in enumerate(zip(made.logits, made.scores, strict=True)):
        question = ask(sampling, [text[4 : 4 + step]], tuple(prompt), prompt=4)
        assert torch.equal(fast.shape(logits, question), scores)


@chooser
def test_frequency_and_presence_count_the_output_alone(choose: Sampler) -> None:
    logits = np.array([[0.0, 5.0, 4.5, 4.0, 3.0]] * 3, dtype=np.float32)
    text, paths = (1, 1, 1, 2), [[], [1], [1, 1]]
    assert choose(logits, ask(build(presence_penalty=0.9), paths, text, prompt=3)).tolist() == [
        1,
        1,
        1,
    ]
    assert choose(logits, ask(build(presence_penalty=1.1), paths, text, prompt=3)).tolist() == [
        1,
        3,
        3,
    ]
    assert choose(logits, ask(build(frequency_penalty=0.6), paths, text, prompt=3)).tolist() == [
        1,
        1,
        3,
    ]
    assert choose(logits, ask(build(repetition_penalty=1.3), paths, text, prompt=3)).tolist() == [
        3,
        3,
        3,
    ]


@chooser
def test_the_end_is_barred_for_min_tokens(choose: Sampler) -> None:
    logits = np.array([[9.0, 1.0, 0.0, 8.0, 0.5]] * 3, dtype=np.float32)
    assert choose(
        logits, ask(build(min_tokens=2), [[], [1], [1, 2]], (1, 2), prompt=2)
    ).tolist() == [1, 1, 0]


@chooser
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_a_constraint_bars_is_never_chosen(choose: Sampler, temperature: float) -> None:
    """However likely it is, however it is favoured, and however few the filters leave."""
    rng = np.random.default_rng(1)
    logits, allowed = (
        rng.standard_normal((200, 50)).astype(np.float32) * 5,
        rng.random((200, 50)) < 0.1,
    )
    allowed[np.arange(200), rng.integers(0, 50, 200)] = True
    barred = (int((~allowed).sum(axis=0).argmax()), 100.0)
    sampling = build(
        temperature=temperature,
        top_k=2,
        top_p=0.7,
        min_p=0.2,
        logit_bias=(barred,),
        repetition_penalty=1.3,
    )
    paths = [[7] * (row % 5) for row in range(200)]
    chosen = choose(logits, constrained(sampling, paths, allowed))
    assert allowed[np.arange(200), chosen].all()
    assert len(set(chosen.tolist())) > 20


@chooser
def test_a_constraint_that_bars_nothing_changes_nothing(choose: Sampler) -> None:
    logits, paths = some_logits(6, 40).numpy(), [[3] * row for row in range(6)]
    for sampling in (build(), build(temperature=0.7, top_p=0.8, min_tokens=4)):
        free = choose(logits, constrained(sampling, paths, np.ones((6, 40), np.bool_)))
        assert free.tolist() == choose(logits, ask(sampling, paths)).tolist()


@chooser
@pytest.mark.parametrize(
    "early", [{"min_tokens": 9}, {"ignore_eos": True}, {"min_tokens": 9, "temperature": 1.0}]
)
def test_an_end_that_comes_too_early_is_chosen_where_nothing_else_is_allowed(
    choose: Sampler, early: dict[str, object]
) -> None:
    logits = np.array([[9.0, 1.0, 0.0, 8.0, 0.5]] * 3, dtype=np.float32)
    allowed = np.array(
        [[1, 0, 1, 1, 0], [1, 0, 0, 1, 0], [0, 0, 0, 1, 0]], dtype=np.bool_
    )  # ends are 0 and 3
    assert choose(logits, constrained(build(**early), [[]] * 3, allowed)).tolist()[0] == 2
    assert choose(
        logits, constrained(build(**early | {"temperature": 0.0}), [[]] * 3, allowed)
    ).tolist() == [2, 0, 3]


@chooser
def test_greedy_takes_the_first_of_equals(choose: Sampler) -> None:
    assert choose(
        np.array([[1.0, 3.0, 3.0, 2.0]], dtype=np.float32), ask(build(top_k=1, top_p=0.1), [[]])
    ).tolist() == [1]


@chooser
@pytest.mark.parametrize("sampling", [{"top_p": 0.0}, {"temperature": 1e-8}], ids=str)
def test_the_least_values_are_greedy(choose: Sampler, sampling: dict[str, float]) -> None:
    logits = np.tile(LOGITS, (ROWS, 1))
    inputs = ask(build(**{"temperature": 1.0, **sampling}), [[]] * ROWS)
    assert set(choose(logits, inputs).tolist()) == {int(LOGITS.argmax())}


def test_greedy_without_penalties_leaves_the_logits_alone() -> None:
    logits = torch.randn(3, 20)
    assert fast.shape(logits, ask(build(top_k=3, top_p=0.5), [[], [], []])) is logits
