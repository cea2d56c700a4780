"""A model folder is untrusted data: none of its code runs, and broken files are refused."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.models.loader import load_model, load_tokenizer
from tests.support.families import VOCABULARY
from tests.support.model_folders import WEIGHTS, edit, refused


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_alone(folder: Path, file: str) -> None:
    (folder / WEIGHTS).rename(folder / file)
    refused(folder, f"has no safetensors, only {file}: convert it")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json is invalid JSON"),
        ('{"model_type": ' + "9" * 5000 + "}", "config.json is invalid JSON"),
        ("[]", "config.json is not a JSON object"),
        ("[" * 100_000, "config.json is invalid JSON"),
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
    refused(folder, "config.json requires its own code (auto_map)", load)
    edit(folder / "config.json", auto_map=None)
    (folder / "modeling_x.py").write_text("raise SystemExit(1)")
    refused(folder, "contains its own code (modeling_x.py)", load)


def test_code_of_the_authors_in_the_tokenizer(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.X", None]})
    refused(folder, "tokenizer_config.json requires its own code", load_tokenizer)


def test_pickled_weights_next_to_safetensors_are_not_opened(folder: Path) -> None:
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
def test_code_requested_by_a_nested_setting_is_refused(
    folder: Path, asking: dict[str, object]
) -> None:
    edit(folder / "config.json", **asking)
    refused(folder, "config.json requires its own code")


def test_a_known_attention_name_is_not_code(folder: Path) -> None:
    edit(folder / "config.json", _attn_implementation="sdpa")
    assert load_model(str(folder)).vocabulary == VOCABULARY


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_deeply_nested_json_is_refused(folder: Path, file: str) -> None:
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
        "{% if messages|length == 3 %}{{ 9 ** (9 ** 9) }}"
        "{% else %}{{ raise_exception('system first') }}{% endif %}",
        "{% set x = namespace(s='aaaaaaaaaaaaaaaa') %}"
        "{% for i in range(40) %}{% set x.s = x.s ~ x.s %}{% endfor %}",
        "{{ 'long' * 1000000 }}",
    ],
    ids=["loops", "power", "memory", "long"],
)
def test_an_endless_template_is_refused(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    refused(folder, "has a chat template that does not end within", load_tokenizer)
    assert load_model(str(folder)).vocabulary == VOCABULARY, "the model works without its template"


def test_valid_templates_are_accepted(folder: Path) -> None:
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


@pytest.mark.parametrize("file", [WEIGHTS, "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder(folder: Path, file: str) -> None:
    outside = folder.parent / "outside"
    (folder / file).rename(outside)
    (folder / file).symlink_to(outside)
    refused(folder, f"{file} is a link that leads out of the folder")


def test_a_template_linked_from_another_folder(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").symlink_to("/etc/hostname")
    refused(folder, "tool.jinja is a link that leads out of the folder", load_tokenizer)


def test_a_link_to_itself(folder: Path) -> None:
    (folder / "loop").symlink_to(folder / "loop")
    refused(folder, "loop is a link that leads out of the folder")


def test_links_in_the_hubs_cache_are_followed(saved: Path, tmp_path: Path) -> None:
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
    (folder / WEIGHTS).write_bytes(content)
    refused(folder, "model.safetensors is not a whole safetensors file")
