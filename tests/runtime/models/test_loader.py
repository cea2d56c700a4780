"""A model folder loads as saved; each fault gives one line that names it and the way out."""

from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, tokenization_utils_base

from runtime.core.errors import InvalidRequest, ModelRefused
from runtime.models.base import causal
from runtime.models.llama import LlamaPass
from runtime.models.loader import check_loadable, load_model, load_tokenizer, read_config
from runtime.models.vocab_check import vocabulary_hash
from tests.support.families import FAMILIES, VOCABULARY, hf_model, tiny
from tests.support.model_folders import WEIGHTS, edit, refused


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_folder_becomes_the_model_that_was_saved(folder: Path) -> None:
    model = load_model(str(folder), device="cpu")
    assert (model.name, model.dtype, model.device.type) == (str(folder), torch.float32, "cpu")
    rows = causal(np.arange(9), 0)
    assert torch.equal(
        model.forward(model.new_cache(), rows),
        hf_model("llama").forward(hf_model("llama").new_cache(), rows),
    )


def test_the_step_can_be_transformers_own(folder: Path) -> None:
    generic, auto = (
        load_model(str(folder), device="cpu", step="generic"),
        load_model(str(folder), device="cpu"),
    )
    assert generic.step is generic.generic
    assert isinstance(auto.step, LlamaPass)
    rows = causal(np.arange(9), 0)
    own = generic.module(torch.arange(9)[None], use_cache=False).logits[0]
    torch.testing.assert_close(generic.forward(generic.new_cache(), rows), own, atol=1e-5, rtol=0)
    torch.testing.assert_close(auto.forward(auto.new_cache(), rows), own, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)],
)
def test_dtypes(folder: Path, name: str, dtype: torch.dtype) -> None:
    assert load_model(str(folder), name, "cpu").dtype == dtype


def test_auto_is_float32_on_a_cpu_for_every_checkpoint(tmp_path: Path) -> None:
    FAMILIES["llama"]().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(str(tmp_path), device="cpu").dtype == torch.float32


def test_weights_in_several_files(tmp_path: Path) -> None:
    FAMILIES["llama"]().save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert load_model(str(tmp_path)).vocabulary == VOCABULARY
    shards[0].unlink()
    refused(tmp_path, f"has no weight file '{shards[0].name}'")
    index = tmp_path / "model.safetensors.index.json"
    edit(index, weight_map={"a": "../a.safetensors"})
    refused(tmp_path, "has no weight file '../a.safetensors'")
    index.write_text('{"weight_map": ["a"]}')
    refused(tmp_path, "is not an index of weights")


def test_threads_are_set(folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        load_model(str(folder), threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["int8", "", "float64"])
def test_unknown_type(dtype: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"unknown dtype '{dtype}': give auto, float32"):
        load_model("nowhere", dtype)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "unknown device 'tpu'"),
        ("cuda:99", "cuda:99 not found"),
        ("cuda:x", "unknown device"),
    ],
)
def test_unknown_device(device: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        load_model("nowhere", device=device)


@pytest.mark.parametrize(
    "name",
    [
        "/no/such/folder",
        "./folder",
        "../folder",
        "~/no-such-folder",
        "a/b/c",
        "C:\\models",
        "hf://a/b",
        "a//b",
    ],
)
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_no_such_folder(name: str, load: Callable[[str], object]) -> None:
    refused(name, "does not exist", load)


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 2000])
def test_not_a_name(name: str) -> None:
    refused(name, "invalid model name")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["gpt2", "someone/some-model", "a--b", "a.."])
def test_a_hub_that_cannot_be_reached(name: str) -> None:
    refused(name, f"model {name} is not a folder and not available from the Hugging Face hub")


def test_a_file_is_no_folder(folder: Path) -> None:
    refused(folder / WEIGHTS, "is a file")


@pytest.mark.parametrize(
    ("file", "message"),
    [("config.json", "has no config.json"), (WEIGHTS, "has no model.safetensors")],
)
def test_a_missing_file(folder: Path, file: str, message: str) -> None:
    (folder / file).unlink()
    refused(folder, message)


def test_a_text_that_is_too_long_is_not_the_tokenizers_affair(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is one line; a warning of transformers would be another."""
    warned: list[tuple[object, ...]] = []
    monkeypatch.setattr(
        tokenization_utils_base.logger, "warning", lambda *said: warned.append(said)
    )
    edit(folder / "tokenizer_config.json", model_max_length=1)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
    assert tokenizer.encode("w1 w2 w3") == [1, 2, 3]
    assert warned == []


def test_a_missing_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    refused(folder, "has no tokenizer.json", load_tokenizer)
    assert load_model(str(folder)).vocabulary == VOCABULARY


def test_a_download_that_broke_off(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-100])
    refused(folder, "model.safetensors is not a whole safetensors file")


def test_missing_and_misshapen_weights(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file(
        {name: tensor for name, tensor in weights.items() if "q_proj" not in name},
        folder / WEIGHTS,
        {"format": "pt"},
    )
    refused(folder, "lacks 2 of its weights")
    save_file(
        {**weights, "lm_head.weight": torch.zeros(5, 5)},
        folder / WEIGHTS,
        {"format": "pt"},
    )
    refused(
        folder,
        "has 1 weights of other shapes than its config.json says, lm_head.weight of [5, 5] "
        "in place of [96, 32] among them",
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_every_family_are_checked_without_being_read(
    family: str, tmp_path: Path
) -> None:
    FAMILIES[family]().save_pretrained(tmp_path)
    config = read_config(tmp_path, family)
    check_loadable(tmp_path, family, config)
    weights = load_file(tmp_path / WEIGHTS)
    del weights[next(name for name in weights if "norm" in name or "ln_" in name)]
    save_file(weights, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ModelRefused, match=f"{family} lacks 1 of its weights"):
        check_loadable(tmp_path, family, config)


def test_a_model_without_positions_of_its_own(tmp_path: Path) -> None:
    tiny("bloom").save_pretrained(tmp_path)
    refused(tmp_path, "takes no position_ids")


def test_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.get_vocab() == {f"w{number}": number for number in range(VOCABULARY)}
    assert vocabulary_hash(tokenizer) == vocabulary_hash(load_tokenizer(str(folder)))


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"type": "BPE"}}', "null"])
def test_a_broken_tokenizer(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    refused(folder, "tokenizer.json cannot be read", load_tokenizer)
