"""A folder is data from a stranger: each fault is one line that names it and the way out."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, tokenization_utils_base

from runtime.core.errors import InvalidRequest, ModelRefused
from runtime.models.base import causal
from runtime.models.llama import LlamaPass
from runtime.models.loader import load_model, load_tokenizer
from runtime.models.vocab_check import vocabulary_hash
from tests.support.families import FAMILIES, VOCABULARY, hf_model, tiny

MIN_PANEL_WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model; the tests change copies of it."""
    folder = tmp_path_factory.mktemp("saved")
    FAMILIES["llama"]().save_pretrained(folder)
    words = Tokenizer(
        WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0")
    )
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in saved.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refused(folder: Path | str, message: str, load: Callable[[str], object] = load_model) -> None:
    with pytest.raises(ModelRefused) as caught:
        load(str(folder))
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500 + len(str(folder))
    assert message in text
    assert ": " in text, "the way out stands behind a colon"


def test_a_folder_becomes_the_model_that_was_saved(folder: Path) -> None:
    model = load_model(str(folder), device="cpu")
    assert (model.name, model.dtype, model.device.type) == (str(folder), torch.float32, "cpu")
    rows = causal(np.arange(9), 0)
    assert torch.equal(
        model.forward(model.new_cache(), rows),
        hf_model("llama").forward(hf_model("llama").new_cache(), rows),
    )


def test_the_step_may_be_left_to_transformers(folder: Path) -> None:
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
def test_types(folder: Path, name: str, dtype: torch.dtype) -> None:
    assert load_model(str(folder), name, "cpu").dtype == dtype


def test_auto_is_float32_on_a_cpu_whatever_the_checkpoint(tmp_path: Path) -> None:
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
    with pytest.raises(InvalidRequest, match=rf"dtype '{dtype}' is not known: give auto, float32"):
        load_model("nowhere", dtype)


@pytest.mark.parametrize(
    ("device", "message"),
    [("tpu", "'tpu' is not known"), ("cuda:99", "cuda:99 is not here"), ("cuda:x", "not known")],
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
    refused(name, "is not a name")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["gpt2", "someone/some-model", "a--b", "a.."])
def test_a_hub_that_cannot_be_reached(name: str) -> None:
    refused(name, f"model {name} is neither a folder nor to be had from the Hugging Face hub")


def test_a_file_is_no_folder(folder: Path) -> None:
    refused(folder / MIN_PANEL_WEIGHTS, "is a file")


@pytest.mark.parametrize(
    ("file", "message"),
    [("config.json", "has no config.json"), (MIN_PANEL_WEIGHTS, "has no model.safetensors")],
)
def test_a_missing_file(folder: Path, file: str, message: str) -> None:
    (folder / file).unlink()
    refused(folder, message)


def test_a_text_that_is_too_long_is_not_the_tokenizers_affair(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who refuses it says so in one line; a warning of transformers on standard error would be another."""
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


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_alone(folder: Path, file: str) -> None:
    (folder / MIN_PANEL_WEIGHTS).rename(folder / file)
    refused(folder, f"has no safetensors, only {file}: convert it")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json is not readable JSON"),
        ('{"model_type": ' + "9" * 5000 + "}", "config.json is not readable JSON"),
        ("[]", "config.json is not a JSON object"),
        ("[" * 100_000, "config.json is not readable JSON"),
        (" " * (1 << 20) + "{}", "config.json is larger than 1 MiB"),
        ("{}", "config.json names model_type 'None'"),
        ('{"model_type": "no_such_model"}', "config.json names model_type 'no_such_model'"),
        ('{"model_type": ["llama"]}', "config.json names model_type"),
        (
            '{"model_type": "llama", "hidden_size": "big"}',
            "config.json does not fit model_type llama",
        ),
        (
            '{"model_type": "llama", "num_attention_heads": 0}',
            "config.json does not fit model_type llama",
        ),
        ('{"model_type": "vit"}', "(vit) is not a causal language model"),
        ('{"model_type": "bart"}', "(bart) is an encoder-decoder"),
        ('{"model_type": "t5"}', "(t5) is not a causal language model"),
        ('{"model_type": "mamba"}', "(mamba) has layers of type linear_attention"),
        ('{"model_type": "rwkv"}', "(rwkv) has a recurrent state"),
        (
            '{"model_type": "recurrent_gemma"}',
            "(recurrent_gemma) has layers of type linear_attention",
        ),
        ('{"model_type": "falcon", "alibi": true}', "(falcon) has ALiBi positions"),
    ],
)
def test_a_bad_config(folder: Path, content: str, message: str) -> None:
    (folder / "config.json").write_text(content)
    refused(folder, message)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_code_of_the_authors(folder: Path, load: Callable[[str], object]) -> None:
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    refused(folder, "config.json asks for code of its own (auto_map)", load)
    edit(folder / "config.json", auto_map=None)
    (folder / "modeling_x.py").write_text("raise SystemExit(1)")
    refused(folder, "brings code of its own (modeling_x.py)", load)


def test_code_of_the_authors_in_the_tokenizer(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.X", None]})
    refused(folder, "tokenizer_config.json asks for code of its own", load_tokenizer)


def test_pickled_weights_beside_safe_ones_are_not_opened(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert load_model(str(folder)).vocabulary == VOCABULARY


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (66,)


@pytest.mark.parametrize(
    "asking",
    [
        {"text_config": {"auto_map": {"AutoModel": "x.X"}}},
        {"custom_generate": "x"},
        {"_attn_implementation": "someone/kernels"},
        {"attn_implementation": {"text_config": "someone/kernels@v1:f"}},
        {"layers": [[{"experts_implementation": "someone/kernels"}]]},
    ],
)
def test_code_that_is_asked_for_in_a_corner(folder: Path, asking: dict[str, object]) -> None:
    edit(folder / "config.json", **asking)
    refused(folder, "config.json asks for code of its own")


def test_a_known_way_to_attend_is_no_code(folder: Path) -> None:
    edit(folder / "config.json", _attn_implementation="sdpa")
    assert load_model(str(folder)).vocabulary == VOCABULARY


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_configurations_nested_as_deep_as_json_may_be(folder: Path, file: str) -> None:
    (folder / file).write_text('{"model_type": "llama", "a": ' + "[" * 900 + "]" * 900 + "}")
    refused(folder, "copy it again")


@pytest.mark.parametrize(
    ("file", "size", "said"),
    [
        ("config.json", 1 << 30, "1 MiB"),
        ("generation_config.json", 1 << 30, "16 MiB"),
        ("tokenizer_config.json", 1 << 30, "16 MiB"),
        ("tokenizer.json", 1 << 30, "128 MiB"),
        ("chat_template.jinja", 1 << 30, "1 MiB"),
        ("additional_chat_templates/rag.jinja", 1 << 30, "1 MiB"),
    ],
)
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_file_of_a_gigabyte_is_not_read(
    folder: Path, file: str, size: int, said: str, load: Callable[[str], object]
) -> None:
    (folder / file).parent.mkdir(exist_ok=True)
    with (folder / file).open("ab") as sparse:
        sparse.truncate(size)
    refused(folder, f"{Path(file).name} is larger than {said}", load)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% if messages|length == 3 %}{{ 9 ** (9 ** 9) }}{% else %}{{ raise_exception('system first') }}{% endif %}",
        "{% set x = namespace(s='aaaaaaaaaaaaaaaa') %}{% for i in range(40) %}{% set x.s = x.s ~ x.s %}{% endfor %}",
        "{{ 'long' * 1000000 }}",
    ],
    ids=["loops", "power", "memory", "long"],
)
def test_a_template_that_does_not_end(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    refused(folder, "has a chat template that does not end within", load_tokenizer)
    assert load_model(str(folder)).vocabulary == VOCABULARY, "who does not chat does without"


def test_templates_that_end(folder: Path) -> None:
    speak = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    choosy = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + speak
    )
    (folder / "chat_template.jinja").write_text(choosy)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "other.jinja").write_text(speak)
    tokenizer = load_tokenizer(str(folder))
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        == "user: hi\n"
    )
    assert set(tokenizer.chat_template) == {"default", "other"}


def test_a_template_cannot_reach_out_of_its_sandbox(folder: Path, tmp_path: Path) -> None:
    code = f"open('{tmp_path}/reached', 'w')"
    (folder / "chat_template.jinja").write_text(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os."
        + code
        + " }}"
    )
    load_tokenizer(str(folder))
    assert not (tmp_path / "reached").exists()


@pytest.mark.parametrize("file", [MIN_PANEL_WEIGHTS, "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder(folder: Path, file: str) -> None:
    outside = folder.parent / "outside"
    (folder / file).rename(outside)
    (folder / file).symlink_to(outside)
    refused(folder, f"{file} is a link that leads out of the folder")


def test_a_template_of_another_folder(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").symlink_to("/etc/hostname")
    refused(folder, "tool.jinja is a link that leads out of the folder", load_tokenizer)


def test_a_link_to_itself(folder: Path) -> None:
    (folder / "loop").symlink_to(folder / "loop")
    refused(folder, "loop is a link that leads out of the folder")


def test_the_links_of_the_hubs_own_cache_are_followed(saved: Path, tmp_path: Path) -> None:
    blobs, snapshot = (
        tmp_path / "models--a--b" / "blobs",
        tmp_path / "models--a--b" / "snapshots" / "0123",
    )
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in saved.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert load_model(str(snapshot)).vocabulary == VOCABULARY


def header(size: int, text: bytes = b"") -> bytes:
    return size.to_bytes(8, "little") + text


OVERLAP = json.dumps(
    {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "ab"}
).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        header(1 << 62),
        header(200 << 20),
        header(2, b"[]"),
        header(9, b"{}"),
        header(len(OVERLAP), OVERLAP + bytes(16)),
    ],
    ids=["empty", "short", "absurd", "200-MiB", "array", "past-the-end", "overlap"],
)
def test_a_broken_header(folder: Path, content: bytes) -> None:
    (folder / MIN_PANEL_WEIGHTS).write_bytes(content)
    refused(folder, "model.safetensors is not a whole safetensors file")


def test_a_download_that_broke_off(folder: Path) -> None:
    whole = (folder / MIN_PANEL_WEIGHTS).read_bytes()
    (folder / MIN_PANEL_WEIGHTS).write_bytes(whole[:-100])
    refused(folder, "model.safetensors is not a whole safetensors file")


def test_missing_and_misshapen_weights(folder: Path) -> None:
    weights = load_file(folder / MIN_PANEL_WEIGHTS)
    save_file(
        {name: tensor for name, tensor in weights.items() if "q_proj" not in name},
        folder / MIN_PANEL_WEIGHTS,
        {"format": "pt"},
    )
    refused(folder, "lacks 2 of its weights")
    save_file(
        {**weights, "lm_head.weight": torch.zeros(5, 5)},
        folder / MIN_PANEL_WEIGHTS,
        {"format": "pt"},
    )
    refused(folder, "cannot be loaded")


def test_a_model_without_positions_of_its_own(tmp_path: Path) -> None:
    tiny("bloom").save_pretrained(tmp_path)
    refused(tmp_path, "cannot be told positions")


def test_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.get_vocab() == {f"w{number}": number for number in range(VOCABULARY)}
    assert vocabulary_hash(tokenizer) == vocabulary_hash(load_tokenizer(str(folder)))


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"type": "BPE"}}', "null"])
def test_a_broken_tokenizer(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    refused(folder, "tokenizer.json cannot be read", load_tokenizer)
