"""With drafters or without, the output is the target's own, which is that of transformers.

The tests run in float32 on the CPU. Lock-step tests do not depend on time, so they assert the
number of rounds too: a fault that costs only speed would go unnoticed otherwise.
"""

import asyncio
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

from runtime.core.messages import Request
from runtime.core.sampler_reference import reference_sample
from runtime.draft.draft_engine import DraftEngine
from runtime.drafters.base import Drafter
from runtime.drafters.model import ModelDrafter
from runtime.drafters.ngram import NgramDrafter
from runtime.drafters.noisy import NoisyDrafter
from runtime.models.base import Model
from runtime.models.hf import HFModel
from runtime.models.sampler import choose
from runtime.models.toy import ToyModel
from runtime.schedulers.fixed import Fixed
from tests.contracts.link_contract import PATIENCE_S
from tests.support.families import FAMILIES, VOCABULARY, hf_model
from tests.support.harness import (
    Dying,
    Known,
    Lockstep,
    Mute,
    Output,
    answer,
    asking,
    attached,
    engine_of,
    hosted,
    output,
    plain,
    running,
    transformers_greedy,
)

EOS = frozenset({1})
PROMPTS = (
    (5, 6, 7, 8, 5, 6, 7, 8, 5, 6),
    (9, 4, 2, 9, 4, 2, 9, 4, 2, 9),
)  # n-grams find something in them
COUNT = 24


@dataclass(frozen=True, slots=True)
class Shape:
    """A tree of `depth` levels: a pass expands `width` leaves; `rows` are verified."""

    width: int
    branches: int
    depth: int
    rows: int


TREES = {
    "chain": Shape(1, 1, 4, 4),
    "2x2": Shape(2, 2, 2, 6),
    "4x4": Shape(4, 4, 2, 20),
    "64 nodes": Shape(16, 4, 3, 64),
}

# A drafter for a text that is known to the test, with so many branches.
DRAFTERS: dict[str, Callable[[Sequence[int], int], Drafter]] = {
    "perfect": lambda text, branches: Known(text, VOCABULARY, branches),
    "noisy": lambda text, branches: NoisyDrafter(
        Known(text, VOCABULARY, branches), VOCABULARY, 0.3
    ),
    "wrong": lambda text, branches: NoisyDrafter(
        Known(text, VOCABULARY, branches), VOCABULARY, 1.0
    ),
    "ngram": lambda text, branches: NgramDrafter(),
    "mute": lambda text, branches: Mute(),
    "killed": lambda text, branches: Known(text, VOCABULARY, branches),
}


# `make test` runs a covering subset of families x drafters x trees, with every pair of the three.
# `make test-exactness` runs the whole product before a release.
EXHAUSTIVE = os.environ.get("OUTRIDER_TEST_EXHAUSTIVE") == "1"
COMBINATIONS = [
    (family, drafter, tree)
    for place, family in enumerate(FAMILIES)
    for other, drafter in enumerate(DRAFTERS)
    for third, tree in enumerate(TREES)
    if EXHAUSTIVE or (place + other) % len(TREES) == third
]


@dataclass(frozen=True, slots=True)
class Family:
    """A tiny model with its plain output, by transformers and by the engine without drafters."""

    model: HFModel
    request: Request
    tokens: tuple[int, ...]
    alone: Output

    @property
    def text(self) -> list[int]:
        return [*self.request.prompt, *self.tokens]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return made(request.param)


@pytest.fixture
def llama() -> Family:
    return made("llama")


@cache
def made(name: str) -> Family:
    """With the first of the prompts that the model does not end early."""
    model = hf_model(name)
    outputs = ((prompt, transformers_greedy(model.module, prompt, COUNT)) for prompt in PROMPTS)
    prompt, tokens = next((prompt, tokens) for prompt, tokens in outputs if len(tokens) == COUNT)
    request = asking(prompt, max_tokens=COUNT)
    return Family(model, request, tokens, plain(model, request, EOS, choose))


def test_the_subset_covers_every_pair() -> None:
    names = (list(FAMILIES), list(DRAFTERS), list(TREES))
    for one, other in itertools.combinations(range(3), 2):
        covered = {(combination[one], combination[other]) for combination in COMBINATIONS}
        assert covered == set(itertools.product(names[one], names[other]))


def test_speculation_off_is_what_transformers_generates(family: Family) -> None:
    assert family.alone.tokens == family.tokens
    assert (family.alone.reason, len(family.tokens)) == ("length", COUNT)
    assert len(set(family.tokens)) > 3
    assert family.alone.stats.rounds == COUNT


@pytest.mark.parametrize(("name", "drafter", "tree"), COMBINATIONS)
def test_speculation_on_is_speculation_off(name: str, drafter: str, tree: str) -> None:
    family, shape = made(name), TREES[tree]
    draft_engine = DraftEngine(DRAFTERS[drafter](family.text, shape.branches), "d", shape.width)
    lockstep = Lockstep(
        engine_of(family.model, shape.rows, EOS, choose), draft_engine, passes=shape.depth
    )
    chunks = lockstep.admit(family.request)
    while lockstep.engine.requests.running:
        if drafter == "killed" and lockstep.draft_engines and len(chunks) == 2:
            lockstep.leave(draft_engine)
        lockstep.round()
    found = output(chunks)
    assert found.tokens == family.tokens
    assert found.said() == family.alone.said()
    check_speed(drafter, found, -(-COUNT // (shape.depth + 1)), 2 * shape.depth)


def check_speed(drafter: str, found: Output, best: int, before: int) -> None:
    """`best`: the rounds of a perfect drafter; `before`: what it brings before it is killed."""
    stats = found.stats
    match drafter:
        case "perfect":
            assert (stats.rounds, stats.accepted) == (best, COUNT - best)
        case "noisy":
            assert best < stats.rounds < COUNT
        case "wrong":
            assert (stats.rounds, stats.accepted) == (COUNT, 0)
            assert stats.verified >= COUNT - 1
        case "ngram":
            assert stats.verified > 0
        case "mute":
            assert (stats.rounds, stats.drafted) == (COUNT, 0)
        case "killed":
            assert (stats.accepted, stats.rounds) == (before, COUNT - before)


def test_a_model_drafts_perfectly_for_itself(family: Family) -> None:
    """Its cache, with branches, misses and prefills, is as exact as the target's."""
    for temperature in (0.0, 0.9):
        request = asking(
            family.request.prompt,
            max_tokens=COUNT,
            temperature=temperature,
            seed=11,
            min_tokens=COUNT,
        )
        lockstep = Lockstep(
            engine_of(family.model, 6, EOS, choose),
            DraftEngine(ModelDrafter(family.model, branches=2), "d", 2),
        )
        (found,) = lockstep.run(request)
        assert found.said() == plain(family.model, request, EOS, choose).said()
        # Noise gives every order of probability: the better path may be third or outside the pool.
        assert (
            found.stats.rounds == COUNT // 3
            if temperature == 0.0
            else found.stats.rounds <= COUNT // 2
        )


@pytest.mark.parametrize("tree", TREES)
def test_an_end_of_text_inside_an_accepted_run(tree: str) -> None:
    """transformers stops at it as we do: it is the last token."""
    shape, prompt, model = TREES[tree], (11, 12, 13, 11, 12, 13, 11, 12), hf_model("gpt2")
    tokens = transformers_greedy(model.module, prompt, COUNT)
    assert 5 < len(tokens) < COUNT
    more = plain(model, asking(prompt, ignore_eos=True), EOS, choose).tokens
    draft_engine = DraftEngine(
        Known([*prompt, *more], VOCABULARY, shape.branches), "d", shape.width
    )
    (found,) = Lockstep(
        engine_of(model, shape.rows, EOS, choose), draft_engine, passes=shape.depth
    ).run(asking(prompt))
    assert found.tokens == tokens == more[: len(tokens)]
    assert found.said() == plain(model, asking(prompt), EOS, choose).said()
    assert found.reason == "stop"
    assert found.stats.rounds == -(-len(tokens) // (shape.depth + 1))


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_with_threads_and_links(llama: Family, drafter: str, tree: str) -> None:
    """Growth arrives at any time. The target waits for drafters that always have some."""
    shape, patience = (
        TREES[tree],
        PATIENCE_S if drafter in ("perfect", "noisy", "wrong", "killed") else 0.002,
    )

    async def main() -> Output:
        body = DRAFTERS[drafter](llama.text, shape.branches)
        async with (
            running(llama.model, Fixed(shape.rows, patience), EOS, choose) as target,
            hosted(body, width=shape.width) as host,
        ):
            await attached(target, "d", Dying(host, 2) if drafter == "killed" else host)
            found = await answer(target, llama.request)
            assert target.lost == ({"d": 1} if drafter == "killed" else {})
            return found

    found = asyncio.run(main())
    assert found.tokens == llama.tokens
    assert found.said() == llama.alone.said()
    match drafter:
        case "perfect":
            assert found.stats.rounds <= COUNT // 2
        case "noisy" | "killed":
            assert found.stats.accepted > 0
        case "wrong":
            assert found.stats.accepted == 0 < found.stats.verified
        case "mute":
            assert found.stats.drafted == 0


# Sampling


MIXES: tuple[dict[str, Any], ...] = (
    {},
    {"top_p": 0.9},
    {"top_k": 6, "min_p": 0.05},
    {"presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"repetition_penalty": 1.4, "logit_bias": ((5, 3.0), (7, -100.0), (9, 1.5))},
    {
        "top_p": 0.95,
        "top_k": 12,
        "min_p": 0.02,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.3,
        "logit_bias": ((3, 2.0),),
        "min_tokens": 9,
    },
)


@pytest.mark.parametrize("seed", [0, 7, 2**40])
@pytest.mark.parametrize("temperature", [0.4, 0.8, 1.3])
def test_seeded_sampling_on_is_off(temperature: float, seed: int) -> None:
    model = ToyModel(vocabulary=24, memory=4)
    accepted = sampled(model, range(20), temperature, seed, reference_sample)
    assert accepted > 20 * COUNT / 3


@pytest.mark.parametrize("seed", [0, 7, 2**40])
@pytest.mark.parametrize("temperature", [0.4, 0.8, 1.3])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_seeded_sampling_on_is_off_for_models(
    name: str, temperature: float, seed: int, loaded: dict[str, HFModel]
) -> None:
    assert sampled(loaded[name], (1, 3, 5), temperature, seed, choose) > 3 * COUNT / 3


@pytest.fixture(scope="module")
def loaded() -> dict[str, HFModel]:
    return {name: hf_model(name) for name in ("llama", "gemma2")}


def sampled(
    model: Model, numbers: Sequence[int], temperature: float, seed: int, chooser: Any
) -> int:
    """Runs one prompt per number with and without drafts; returns the accepted drafted tokens."""
    accepted, outputs = 0, set()
    for number in numbers:
        prompt = [(number * 5 + place * place) % 24 for place in range(3 + number)]
        request = asking(
            prompt,
            max_tokens=COUNT,
            temperature=temperature,
            seed=seed,
            **MIXES[number % len(MIXES)],
        )
        lockstep = Lockstep(
            engine_of(model, 8, EOS, chooser), DraftEngine(ModelDrafter(model, branches=2), "d", 2)
        )
        (found,) = lockstep.run(request)
        assert found.said() == plain(model, request, EOS, chooser).said()
        accepted += found.stats.accepted
        outputs.add(found.tokens)
    assert len(outputs) == len(numbers)
    return accepted
