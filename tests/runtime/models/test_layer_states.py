"""Every pass shows the states between its layers as transformers computes them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch

from runtime.core.errors import ModelRefused
from runtime.core.features import FeatureBits
from runtime.models.base import OutputSpec, PassInput, Rows, causal
from runtime.models.hf import HFModel
from runtime.models.llama import LlamaPass
from tests.support.families import FAMILIES, hf_model, tiny
from tests.support.features import BFLOAT16_STEP, numbers
from tests.support.static_pass import LONG, bush, pair


def count_layers(model: HFModel) -> int:
    count: int = model.module.config.get_text_config(decoder=True).num_hidden_layers
    return count


def oracle(model: HFModel, tokens: npt.NDArray[np.int64]) -> list[torch.Tensor]:
    """The input of each layer, (rows, d), by transformers' own output_hidden_states.

    Its last entry has passed the final norm, so the output of the last layer is left out.
    """
    with torch.inference_mode():
        found = model.module(torch.from_numpy(tokens)[None], output_hidden_states=True)
    return [states[0] for states in found.hidden_states[: count_layers(model)]]


def shown(model: HFModel, parts: Sequence[PassInput], layers: tuple[int, ...]) -> list[FeatureBits]:
    found = []
    for output in model.forward_outputs(parts, OutputSpec(features=layers)):
        assert output.features is not None
        assert output.features.layers == layers
        found.append(output.features.rows)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_states_of_each_layer_are_those_of_transformers(family: str) -> None:
    model = hf_model(family)
    layers = tuple(range(count_layers(model)))
    model.check(OutputSpec(features=layers))
    expected = torch.cat(oracle(model, LONG[:20]), dim=-1)
    (rows,) = shown(model, [PassInput(model.new_cache(), causal(LONG[:20], 0), last=0)], layers)
    torch.testing.assert_close(numbers(rows), expected, rtol=BFLOAT16_STEP, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_states_are_those_before_the_final_norm(family: str) -> None:
    model = hf_model(family)
    last = count_layers(model)
    given: list[torch.Tensor] = []
    (inner,) = [
        child
        for name, child in model.module.named_modules()
        if name.split(".")[-1] in FINAL_NORMS and not any(map(str.isdigit, name))
    ]
    hook = inner.register_forward_pre_hook(lambda _, args: given.append(args[0][0].clone()))
    try:
        with torch.inference_mode():
            model.module(torch.from_numpy(LONG[:9])[None])
    finally:
        hook.remove()
    (rows,) = shown(model, [PassInput(model.new_cache(), causal(LONG[:9], 0))], (last,))
    torch.testing.assert_close(numbers(rows), given[0], rtol=BFLOAT16_STEP, atol=1e-4)


FINAL_NORMS = {"norm", "ln_f", "final_layer_norm"}


@dataclass(frozen=True, slots=True)
class Reading:
    """What a text's states look like after it was read in steps of trees."""

    rows: FeatureBits
    logits: torch.Tensor


def read_in_steps(model: HFModel, layers: tuple[int, ...]) -> Reading:
    """Reads a chunk of 12 tokens, then 5 in a tree of other guesses beside another text."""
    kv, other = model.new_cache(), model.new_cache()
    (first,) = shown(model, [PassInput(kv, causal(LONG[:12], 0), last=0)], layers)
    rows = bush(12, 8)
    visible = np.zeros((8, 8), dtype=np.bool_)
    visible[:5, :5] = np.tri(5, dtype=np.bool_)
    visible[5:, 0] = True
    np.fill_diagonal(visible, True)
    positions = np.array([12, 13, 14, 15, 16, 13, 13, 13])
    tree = Rows(rows.tokens, positions, 12, visible)
    parts = [PassInput(other, causal(LONG[:3], 0), last=1), PassInput(kv, tree)]
    outputs = model.forward_outputs(parts, OutputSpec(features=layers))
    second = outputs[1].features
    assert second is not None
    assert len(second.rows) == 8
    return Reading(np.concatenate([first, second.rows[:5]]), outputs[1].logits)


@pytest.mark.parametrize("shape", ["llama", "qwen3 sliding"])
def test_guesses_and_other_texts_in_a_pass_do_not_show(shape: str) -> None:
    generic, static, _ = pair(shape)
    fast = HFModel(tiny("llama"), "fast")
    fast.step = LlamaPass(fast.module)
    layers = (0, 1, 2)
    for model in (generic, static, fast):
        expected = shown(model, [PassInput(model.new_cache(), causal(LONG[:17], 0))], layers)[0]
        read = read_in_steps(model, layers)
        torch.testing.assert_close(
            numbers(read.rows), numbers(expected), rtol=BFLOAT16_STEP, atol=1e-4
        )


def test_the_static_pass_shows_what_the_generic_one_does() -> None:
    generic, static, step = pair("llama")
    for layers in ((0, 2), (1,)):
        one, two = read_in_steps(generic, layers), read_in_steps(static, layers)
        torch.testing.assert_close(
            numbers(one.rows), numbers(two.rows), rtol=BFLOAT16_STEP, atol=1e-4
        )
        torch.testing.assert_close(one.logits, two.logits, atol=5e-5, rtol=0)
    assert {features for _, _, features in step._runs} == {(0, 2), (1,)}


def test_logits_do_not_depend_on_what_is_shown() -> None:
    for model in (hf_model("llama"), hf_model("gpt2")):
        alone = model.forward(model.new_cache(), causal(LONG[:9], 0))
        (output,) = model.forward_outputs(
            [PassInput(model.new_cache(), causal(LONG[:9], 0))], OutputSpec(True, features=(1, 2))
        )
        assert torch.equal(output.logits, alone)
        assert torch.equal(model.unembed(output.hidden), alone)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_layer_out_of_range_is_named(family: str) -> None:
    model = hf_model(family)
    with pytest.raises(ModelRefused, match=r"features of layers \[1, 3\] of a model with 2 layers"):
        model.check(OutputSpec(features=(1, 3)))


def test_a_model_without_a_list_of_layers_shows_none() -> None:
    module = tiny("gpt2", n_inner=48)
    model = HFModel(module, "odd")
    module.config.num_hidden_layers = 3
    with pytest.raises(ModelRefused, match="no list of 3 decoder layers"):
        model.check(OutputSpec(features=(1,)))
