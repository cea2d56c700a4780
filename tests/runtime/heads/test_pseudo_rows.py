"""Heads see hidden states and pseudo rows that no other row sees, and build trees of them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from runtime.core.errors import ModelRefused
from runtime.core.tree_builder import best_first
from runtime.models.base import Branch, OutputSpec, PassInput, Rows, causal
from runtime.models.fast_path import enable_fast_path
from runtime.models.hf import HFModel
from tests.support.families import FAMILIES, hf_model, tiny
from tests.support.llama_shapes import SHAPES, spread, tree
from tests.support.static_pass import LONG, give, recorded


def naive(
    model: HFModel, text: Sequence[int], layers: Sequence[int], maps: Sequence[torch.nn.Linear]
) -> torch.Tensor:
    """Returns logits (maps, vocabulary) of the pseudo states after `text`, by transformers."""
    body: Any = model.module.model
    with torch.inference_mode():
        states = model.module(
            torch.tensor([list(text)]), output_hidden_states=True, use_cache=False
        ).hidden_states
        n, k = len(text), len(maps)
        x = states[0]
        for depth, layer in enumerate(body.layers):
            for index, linear in enumerate(maps):
                if layers[index] == depth:
                    x = torch.cat([x, linear(x[:, n - 1 : n])], dim=1)
            places = torch.arange(x.shape[1])[None]
            mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)[None, None]
            x = layer(
                x,
                attention_mask=mask,
                position_ids=places,
                position_embeddings=body.rotary_emb(x, places),
            )
            x = x[0] if isinstance(x, tuple) else x
        logits: torch.Tensor = model.module.lm_head(body.norm(x))[0, n : n + k]
        return logits


@pytest.mark.parametrize("layers", [(1, 1, 1), (1, 2, 2), (2, 3)])
def test_pseudo_rows_pass_the_remaining_layers(layers: tuple[int, ...]) -> None:
    """A pass with other trees and rows gives the same result, and no token row changes."""
    model = deep()
    maps = [torch.nn.Linear(32, 32) for _ in layers]
    output_spec = OutputSpec(
        True, tuple(Branch(layer, linear) for layer, linear in zip(layers, maps, strict=True))
    )
    model.check(output_spec)
    texts = (list(range(2, 13)), [40, 41, 7])
    visible = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], dtype=np.bool_)
    paths: tuple[list[int], ...] = ([], [51], [52], [51, 53])
    for branch_rows in (((0, 3), (2,)), ((1,), ()), ((), (0, 1, 2, 3)), ((), ())):
        caches, parts = [model.new_cache() for _ in texts], []
        for cache, text, rode in zip(caches, texts, branch_rows, strict=True):
            model.forward(cache, causal(np.array(text), 0))
            rows = Rows(
                np.array([50, 51, 52, 53]), len(text) + np.array([0, 1, 1, 2]), len(text), visible
            )
            parts.append(PassInput(cache, rows, branch_rows=rode))
        output = model.forward_outputs(parts, output_spec)
        lengths = [cache.length for cache in caches]
        assert lengths == [len(text) + 4 for text in texts]
        for cache, text in zip(caches, texts, strict=True):
            cache.truncate(len(text))
        for one, text, part, logits in zip(
            output, texts, parts, model.forward_all(parts), strict=True
        ):
            torch.testing.assert_close(one.logits, logits, atol=2e-5, rtol=0)
            torch.testing.assert_close(model.unembed(one.hidden), logits, atol=2e-5, rtol=0)
            for place, row in enumerate(part.branch_rows):
                expected = naive(model, [*text, 50, *paths[row]], layers, maps)
                torch.testing.assert_close(one.branch_logits[place], expected, atol=5e-5, rtol=0)


def deep() -> HFModel:
    model = HFModel(tiny("llama", num_hidden_layers=4), "deep")
    enable_fast_path(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_that_logits_are_made_of(family: str) -> None:
    """For each family that has them, of two texts in one pass or in two."""
    model = hf_model(family)
    model.check(OutputSpec(hidden=True))
    parts = [PassInput(model.new_cache(), causal(np.arange(2, 2 + n), 0)) for n in (5, 3)]
    for one, part in zip(model.forward_outputs(parts, OutputSpec(hidden=True)), parts, strict=True):
        assert len(one.hidden) == len(part.rows.tokens) == len(one.logits)
        assert torch.equal(model.unembed(one.hidden).argmax(-1), one.logits.argmax(-1))


def test_layers_that_are_none_are_refused() -> None:
    for layers in ((-1,), (2,), (1, 0)):
        with pytest.raises(ModelRefused, match="pseudo rows that enter at layers"):
            hf_model("llama").check(
                OutputSpec(branches=tuple(Branch(layer, lambda states: states) for layer in layers))
            )


def test_what_fails_leaves_the_caches_as_they_were() -> None:
    model = hf_model("llama")
    cache = model.new_cache()
    model.forward(cache, causal(np.arange(2, 12), 0))

    def fails(states: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        model.forward_outputs(
            [PassInput(cache, causal(np.arange(3), 10), branch_rows=(1,))],
            OutputSpec(branches=(Branch(1, fails),)),
        )
    assert cache.length == 10


def test_what_heads_look_at_is_shown_as_by_the_short_pass() -> None:
    """Passes with hidden states, with pseudo rows and with neither are recorded separately."""
    kind, options = SHAPES["qwen3 sliding"]
    counts: list[int] = []
    quick, static = (HFModel(spread(tiny(kind, **options)), "m") for _ in range(2))
    enable_fast_path(quick)
    give(static, record=partial(recorded, counts))
    double = OutputSpec(
        True, (Branch(1, lambda states: 2 * states), Branch(1, lambda states: states + 1))
    )
    found: list[list[torch.Tensor]] = []
    for model in (quick, static):
        one, two = model.new_cache(), model.new_cache()
        tensors = [model.forward(one, causal(LONG[:9], 0)), model.forward(two, causal(LONG[:3], 0))]
        for output_spec in (OutputSpec(True), double, OutputSpec(), OutputSpec(True)):
            parts = [
                PassInput(one, tree(one.length), branch_rows=(0, 3)),
                PassInput(two, tree(two.length), branch_rows=(2,)),
            ]
            for output in model.forward_outputs(parts, output_spec):
                tensors += [
                    tensor
                    for tensor in (output.logits, output.hidden, output.branch_logits)
                    if tensor is not None
                ]
        tensors.append(model.unembed(torch.ones(2, 32)))
        found.append(tensors)
    assert counts
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=5e-5, rtol=0)


def test_the_likeliest_ways() -> None:
    tokens, scores = np.array([[1, 2], [3, 4]]), np.log([[0.6, 0.4], [0.9, 0.1]])
    growth = best_first(tokens, scores, nodes=4)
    assert list(zip(growth.parents.tolist(), growth.tokens.tolist(), strict=True)) == [
        (0, 1),
        (1, 3),
        (0, 2),
        (3, 3),
    ]
    assert np.exp(growth.scores) == pytest.approx([0.6, 0.9, 0.4, 0.9])
    assert len(best_first(tokens, scores, floor=float(np.log(0.05))).tokens) == 5
    assert len(best_first(np.empty((0, 2), np.int64), np.empty((0, 2))).tokens) == 0
    assert best_first(tokens, np.where(tokens == 2, -np.inf, scores)).tokens.tolist() == [1, 3, 4]
