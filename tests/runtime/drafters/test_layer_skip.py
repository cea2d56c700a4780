"""A model of some layers computes what those layers compute, and drafts for the whole model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from actors.compose import build_drafter
from runtime.config import DrafterConfig
from runtime.core.errors import ModelRefused
from runtime.deployment_builder import build_deployment, read_layers
from runtime.draft.draft_engine import DraftEngine
from runtime.drafters.model import ModelDrafter
from runtime.models.base import causal
from runtime.models.layer_subset import every_second_layer, keep_layers, truncated_config
from runtime.models.loader import load_model
from runtime.models.sampler import choose
from tests.support.families import FAMILIES, tiny
from tests.support.harness import Lockstep, asking, engine_of, plain
from tests.support.pair import save_model

TEXT = np.array([5, 6, 7, 8, 5, 6])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("four"), num_hidden_layers=4)


@pytest.mark.parametrize("layers", [[0, 2], [1], [0, 1, 2, 3], [3]])
def test_it_computes_what_these_layers_compute(folder: Path, layers: list[int]) -> None:
    whole, part = load_model(str(folder), step="generic"), load_model(str(folder), layers=layers)
    body: Any = whole.module.model
    body.layers = nn.ModuleList(body.layers[layer] for layer in layers)
    with torch.inference_mode():
        expected = whole.module(torch.from_numpy(TEXT[None]), use_cache=False).logits[0]
    assert len(part.new_cache().layers) == len(layers)
    torch.testing.assert_close(
        part.forward(part.new_cache(), causal(TEXT, 0)), expected, atol=1e-4, rtol=0
    )


def test_by_default_it_is_every_second(folder: Path) -> None:
    part, said = load_model(str(folder), layers=()), load_model(str(folder), layers=[0, 2])
    logits = [model.forward(model.new_cache(), causal(TEXT, 0)) for model in (part, said)]
    assert torch.equal(*logits)
    assert every_second_layer(part.module.config) == [0]


@pytest.mark.parametrize("layers", [[4], [1, 0], [0, 0], [-1, 2]])
def test_layers_that_are_none_are_refused(folder: Path, layers: list[int]) -> None:
    with pytest.raises(ModelRefused, match="are not some of the 4 of"):
        load_model(str(folder), layers=layers)


def test_models_built_otherwise_are_refused() -> None:
    module = FAMILIES["gpt2"]()
    with pytest.raises(ModelRefused, match="does not store its layers as Llama does"):
        keep_layers(module, [0], "g")


def test_windows_go_with_their_layers() -> None:
    config: Any = tiny(
        "qwen2", num_hidden_layers=4, use_sliding_window=True, sliding_window=6, max_window_layers=2
    ).config
    assert config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    found: Any = truncated_config(config, [1, 2], "q")
    assert found.layer_types == ["full_attention"] * 2 + ["sliding_attention"]
    assert (config.num_hidden_layers, found.num_hidden_layers) == (4, 3)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_it_drafts_for_the_whole(folder: Path, temperature: float) -> None:
    target = load_model(str(folder))
    host = build_drafter(
        DrafterConfig(name="d", method="layer-skip", layers=(0, 1, 3), device="cpu"), str(folder)
    )
    drafter = host.draft_engine.drafter
    assert isinstance(drafter, ModelDrafter)
    request = asking(TEXT.tolist(), max_tokens=40, temperature=temperature, seed=2)
    (found,) = Lockstep(engine_of(target, chooser=choose), DraftEngine(drafter, "d", 2)).run(
        request
    )
    assert found.said() == plain(target, request, chooser=choose).said()
    assert found.stats.verified > 0


def test_what_was_tuned_is_a_draft(tmp_path: Path) -> None:
    tuned, other = tmp_path / "tuned.json", tmp_path / "other.json"
    tuned.write_text(json.dumps({"method": "layer-skip", "layers": [0, 3]}))
    other.write_text(json.dumps({"layers": [0, 3]}))
    assert (read_layers(str(tuned)), read_layers(str(other)), read_layers("ngram")) == (
        (0, 3),
        (),
        (),
    )
    made = build_deployment("t", (str(tuned), "layer-skip", "ngram"), 1, "auto", "cpu", local=False)
    assert [(drafter.method, drafter.model, drafter.layers) for drafter in made.drafters()] == [
        ("layer-skip", "", (0, 3)),
        ("layer-skip", "", ()),
        ("ngram", "", ()),
    ]
