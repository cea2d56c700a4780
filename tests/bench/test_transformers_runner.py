"""transformers in its own process: what it says is what generate() says."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from bench.core.methods import (
    GREEDY,
    TRANSFORMERS_METHODS,
    Method,
    OutriderMethod,
    TransformersMethod,
)
from bench.core.prompts import Prompt
from bench.core.transformers_runner import TransformersRunner, WorkerSpec, until_end
from runtime.core.errors import InvalidRequest, Unavailable
from runtime.core.sampling_params import SamplingParams
from tests.support.pair import save_model

PROMPTS = [Prompt("a", tuple(range(5, 25))), Prompt("b", tuple(range(40, 52)))]
GREEDILY = SamplingParams(max_tokens=12)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    return save_model(folder / "target"), save_model(folder / "draft", seed=1)


@pytest.fixture(scope="module")
def rivals(pair: tuple[Path, Path]) -> Iterator[TransformersRunner]:
    with TransformersRunner(WorkerSpec(*pair, "float32", (min(os.sched_getaffinity(0)),))) as found:
        yield found


def expected(folder: Path, prompt: Prompt) -> tuple[int, ...]:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt.tokens])
    with torch.inference_mode():
        for _ in range(12):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return tuple(ids[0, len(prompt.tokens) :].tolist())


@pytest.mark.parametrize(
    "method",
    [method for method in TRANSFORMERS_METHODS if method.facts.cores == 1],
    ids=lambda method: method.name,
)
def test_every_method_writes_the_greedy_text(
    rivals: TransformersRunner, pair: tuple[Path, Path], method: Method
) -> None:
    found = rivals.run(method, PROMPTS[:1], GREEDILY)
    assert found.outputs == (expected(pair[0], PROMPTS[0]),)
    assert 1 <= found.first_tokens <= 12
    assert 0 < found.first_seconds <= found.seconds
    sampling = SamplingParams(temperature=0.8, seed=3, max_tokens=12)
    first, again = (rivals.run(method, PROMPTS[:1], sampling).outputs for _ in range(2))
    assert first == again
    assert len(first[0]) <= 12


def test_a_batch_writes_what_its_texts_write_alone(
    rivals: TransformersRunner, pair: tuple[Path, Path]
) -> None:
    found = rivals.run(GREEDY, PROMPTS, GREEDILY)
    assert found.outputs == tuple(expected(pair[0], prompt) for prompt in PROMPTS)
    assert found.first_tokens == 2


def test_constant_guesses_do_not_outlast_their_method(rivals: TransformersRunner) -> None:
    usual, constant = (
        Method("assisted", TransformersMethod("assisted")),
        Method("assisted 3", TransformersMethod("assisted", 3)),
    )
    sampling = SamplingParams(temperature=0.8, seed=1, max_tokens=12)
    before = rivals.run(usual, PROMPTS[:1], sampling).outputs
    rivals.run(constant, PROMPTS[:1], sampling)
    assert rivals.run(usual, PROMPTS[:1], sampling).outputs == before


def test_what_generate_cannot_do_is_refused(rivals: TransformersRunner) -> None:
    with pytest.raises(InvalidRequest, match="one prompt at a time, not 2"):
        rivals.run(Method("assisted", TransformersMethod("assisted")), PROMPTS, GREEDILY)
    with pytest.raises(InvalidRequest, match="not transformers'"):
        rivals.run(Method("plain", OutriderMethod("plain")), PROMPTS, GREEDILY)


def test_a_worker_that_cannot_load_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with (
        TransformersRunner(
            WorkerSpec(tmp_path, tmp_path, "float32", (min(os.sched_getaffinity(0)),))
        ) as found,
        pytest.raises(Unavailable, match="code 1"),
    ):
        found.run(GREEDY, PROMPTS[:1], GREEDILY)
    assert str(tmp_path) in capfd.readouterr().err


def test_a_text_ends_with_its_end() -> None:
    assert until_end([4, 5, 0, 0, 0], {0}) == (4, 5, 0)
    assert until_end([4, 5], {0}) == (4, 5)
    assert until_end([], {0}) == ()
