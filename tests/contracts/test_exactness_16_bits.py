"""In 16 bits on a CPU, too, the output is the same with drafters and without.

A row's logits do not depend on how many rows there are, on hidden guesses, or on which passes
brought its text into the cache: they are equal bit for bit, so no near-tie can flip.
"""

from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
import torch

from runtime.draft.draft_engine import DraftEngine
from runtime.drafters.noisy import NoisyDrafter
from runtime.kernels.jit import is_supported
from runtime.models.base import PassInput, Rows, causal
from runtime.models.fast_path import enable_fast_path, kernels_of
from runtime.models.hf import HFModel
from runtime.models.llama import LlamaPass
from runtime.models.sampler import choose
from tests.support.families import WINDOW, tiny
from tests.support.harness import Known, Lockstep, asking, engine_of, output, plain
from tests.support.llama_shapes import spread

pytestmark = pytest.mark.skipif(not is_supported(), reason="no kernel for this processor")

Tokens = npt.NDArray[np.int64]

EOS = frozenset({1})
VOCABULARY = 300
TEXT = np.random.default_rng(7).integers(2, VOCABULARY, 120)
KINDS = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"head_dim": 64},
}
WIDE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 520,
    "num_hidden_layers": 3,
}  # no matrix in float32 is too small for the kernels
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@cache
def model_of(kind: str, dtype: str) -> HFModel:
    model = HFModel(spread(tiny(kind, **WIDE, **KINDS[kind])).to(DTYPES[dtype]), kind)
    enable_fast_path(model)
    assert isinstance(model.step, LlamaPass)
    return model


def token_by_token(model: HFModel, tokens: Tokens) -> torch.Tensor:
    cache = model.new_cache()
    rows = [
        model.forward(cache, causal(tokens[place : place + 1], place))
        for place in range(len(tokens))
    ]
    return torch.cat(rows)


@kinds
@dtypes
def test_rows_do_not_depend_on_their_number(kind: str, dtype: str) -> None:
    model = model_of(kind, dtype)
    expected = token_by_token(model, TEXT)
    for step in (2, 5, 16, 33, 120):
        cache = model.new_cache()
        found = [
            model.forward(cache, causal(TEXT[start : start + step], start))
            for start in range(0, len(TEXT), step)
        ]
        assert torch.equal(torch.cat(found), expected), step


@kinds
@dtypes
def test_a_branch_is_the_text_without_the_others(kind: str, dtype: str) -> None:
    """Sixteen guesses in branches of two, behind 20 tokens; also after the branch is kept, and in
    a pass with another text.
    """
    model, prefix, guesses = model_of(kind, dtype), TEXT[:20], TEXT[20:36]
    parents = np.array([-1, 0, 0, *(range(1, 14))])
    visible = np.eye(16, dtype=np.bool_)
    for place, parent in enumerate(parents[1:], 1):
        visible[place] |= visible[parent]
    positions = 20 + visible.sum(axis=1) - 1
    cache, other = model.new_cache(), model.new_cache()
    model.forward(cache, causal(prefix, 0))
    model.forward(other, causal(TEXT[50:70], 0))
    tree, beside = model.forward_all(
        [
            PassInput(cache, Rows(guesses, positions, 20, visible)),
            PassInput(other, causal(TEXT[70:73], 20)),
        ]
    )
    assert torch.equal(beside, token_by_token(model, TEXT[50:73])[20:])
    for leaf in (13, 14, 15):
        path = np.flatnonzero(visible[leaf])
        expected = token_by_token(model, np.concatenate([prefix, guesses[path]]))[20:]
        assert torch.equal(tree[path], expected)
    path = np.flatnonzero(visible[15])
    cache.keep(20, [20 + int(place) for place in path])
    length, following = 20 + len(path), TEXT[40:43]
    whole = np.concatenate([prefix, guesses[path], following])
    found = model.forward(cache, causal(following, length))
    assert torch.equal(found, token_by_token(model, whole)[length:])


@kinds
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("wrong", [0.2, 0.8])
def test_speculation_on_is_speculation_off(kind: str, temperature: float, wrong: float) -> None:
    model = model_of(kind, "bfloat16")
    request = asking(
        TEXT[:12].tolist(), max_tokens=48, temperature=temperature, seed=5, min_tokens=48
    )
    alone = plain(model, request, EOS, choose)
    text = [*request.prompt, *alone.tokens]
    drafter = NoisyDrafter(Known(text, VOCABULARY, 4), VOCABULARY, wrong)
    lockstep = Lockstep(engine_of(model, 20, EOS, choose), DraftEngine(drafter, "d", 4), passes=3)
    chunks = lockstep.admit(request)
    while lockstep.engine.requests.running:
        lockstep.round()
    found = output(chunks)
    assert found.said() == alone.said()
    assert found.stats.accepted > 0
    assert found.stats.rounds < 48


def test_all_products_are_of_independent_rows() -> None:
    for kind in KINDS:
        kernels = {choice.kernel for choice in kernels_of(model_of(kind, "bfloat16"))}
        assert kernels <= {"pairs", "panels"}
