"""A widened model costs more and says the same."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bench.core import widen as widening
from bench.core.widen import WideShape, widen, widen_folder
from runtime.core.errors import InvalidRequest, ModelRefused
from tests.support.pair import save_model

WIDE = WideShape(hidden=96, layers=4, ffn=160)
KINDS = {
    "plain": {},
    "grouped heads": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "one key head": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "heads wider than hidden": {"head_dim": 24},
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widening, "CACHE", tmp_path / "cache")


def tiny(**changes: object) -> LlamaForCausalLM:
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "vocab_size": 300,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**shape | changes, initializer_range=0.4, eos_token_id=0, bos_token_id=0)
    ).eval()
    with torch.no_grad():  # norms that do nothing and biases of zero would hide a mistake
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn(weight.shape) * 0.3)
                assert "norm" in name or "bias" in name
    return model


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_logits_and_greedy_text_stay_the_same(changes: dict[str, object]) -> None:
    source = tiny(**changes)
    wide = widen(source, 96, 4, 160, 6, seed=1)
    config = wide.config
    assert (
        config.hidden_size,
        config.num_hidden_layers,
        config.intermediate_size,
        config.num_attention_heads,
    ) == (96, 4, 160, 6)
    tokens = torch.randint(1, 300, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        was, now = source(tokens).logits, wide(tokens).logits
        assert float(was.std()) > 0.5
        torch.testing.assert_close(now, was, rtol=1e-4, atol=1e-4)
        said = [
            m.generate(tokens, max_new_tokens=24, do_sample=False, pad_token_id=0).tolist()
            for m in (source, wide)
        ]
    assert said[0] == said[1]
    assert (wide.lm_head.weight is wide.model.embed_tokens.weight) == config.tie_word_embeddings


def test_the_added_weights_are_read_and_not_zero() -> None:
    wide = widen(tiny(), 96, 4, 160, 6).state_dict()
    for name in ("q_proj", "k_proj", "v_proj"):
        assert wide[f"model.layers.0.self_attn.{name}.weight"][32:].std() > 0.01
        assert wide[f"model.layers.3.self_attn.{name}.weight"].std() > 0.01
    assert wide["model.layers.0.mlp.up_proj.weight"][64:].std() > 0.01


def test_smaller_than_the_source_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="ffn 63 is below the source's 64"):
        widen(tiny(), 96, 4, 63, 6)


@pytest.mark.usefixtures("cache")
def test_heads_fill_the_hidden_size_whatever_their_own(tmp_path: Path) -> None:
    found = LlamaConfig.from_pretrained(
        widen_folder(save_model(tmp_path, num_attention_heads=4), WIDE, "float32")
    )
    assert (found.head_dim, found.num_attention_heads) == (8, 12)


@pytest.mark.usefixtures("cache")
def test_a_folder_is_made_once_and_named_by_its_content(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source")
    first = widen_folder(source, WIDE, "bfloat16")
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert widen_folder(source, WIDE, "bfloat16") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made
    assert widen_folder(source, WIDE, "float32") != first
    save_model(tmp_path / "source", seed=1)
    assert widen_folder(source, WIDE, "bfloat16") != first
    loaded = LlamaForCausalLM.from_pretrained(first, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(first).encode(
        "def f(x):"
    ) == AutoTokenizer.from_pretrained(source).encode("def f(x):")


def test_other_families_and_no_model_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="cannot be read"):
        widen_folder(tmp_path, WIDE, "float32")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelRefused, match="only that family"):
        widen_folder(tmp_path, WIDE, "float32")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelRefused, match="no safetensors"):
        widen_folder(tmp_path, WIDE, "float32")
    with pytest.raises(InvalidRequest, match="float8"):
        widen_folder(tmp_path, WIDE, "float8")
