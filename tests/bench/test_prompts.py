"""Prompts of the benchmark: held-out excerpts, and files in the formats that are in use."""

import json
from collections import Counter
from pathlib import Path

import pytest

from bench.core.prompts import (
    CHAT_PROMPTS,
    MAX_PROMPT_TOKENS,
    MIN_PROMPT_TOKENS,
    MT_BENCH,
    Prompt,
    category,
    encode_prompts,
    held_out_prompts,
    read_prompts,
    sample_prompts,
)
from bench.run import gguf_of
from runtime.core.errors import InvalidRequest
from runtime.models.loader import load_tokenizer
from tests.support.pair import SHIPPED
from training import stdlib_corpus
from training.text import HELD_OUT_SHARE, hash_bucket


def test_held_out_prompts_are_whole_lines_of_different_held_out_files() -> None:
    tokenizer = load_tokenizer(str(SHIPPED))
    found = held_out_prompts(tokenizer, 6, seed=3)
    assert len({prompt.name.rpartition(":")[0] for prompt in found}) == 6
    for prompt in found:
        name, _, line = prompt.name.rpartition(":")
        assert hash_bucket(name, HELD_OUT_SHARE) == 0
        assert MIN_PROMPT_TOKENS <= len(prompt.tokens) <= MAX_PROMPT_TOKENS
        text = tokenizer.decode(list(prompt.tokens))
        rest = "".join(stdlib_corpus.read_source(name).splitlines(keepends=True)[int(line) - 1 :])
        assert rest.startswith(text)
        assert text.endswith("\n")


def test_held_out_prompts_depend_on_the_seed_alone() -> None:
    tokenizer = load_tokenizer(str(SHIPPED))
    assert held_out_prompts(tokenizer, 3, seed=3) == held_out_prompts(tokenizer, 3, seed=3)
    assert held_out_prompts(tokenizer, 3, seed=3)[:2] == held_out_prompts(tokenizer, 2, seed=3)
    assert held_out_prompts(tokenizer, 3, seed=4) != held_out_prompts(tokenizer, 3, seed=3)


def test_more_prompts_than_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib_corpus, "library_files", lambda held_out: [])
    with pytest.raises(InvalidRequest, match="2 prompts are more than the 0"):
        held_out_prompts(load_tokenizer(str(SHIPPED)), 2, seed=0)


FILES = {
    "a.jsonl": (
        '{"prompt": "def f(", "id": 1}\n\n{"turns": ["first", "second"]}\n'
        '{"question": "why?"}\n"bare"\n',
        {"a.jsonl:1": "def f(", "a.jsonl:3": "first", "a.jsonl:4": "why?", "a.jsonl:5": "bare"},
    ),
    "b.json": ('["one\\ntwo", {"text": "three"}]', {"b.json:1": "one\ntwo", "b.json:2": "three"}),
    "c.txt": (
        "first line\n\n  second\u2028line\n",
        {"c.txt:1": "first line", "c.txt:3": "  second\u2028line"},
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_is_read(name: str, tmp_path: Path) -> None:
    text, expected = FILES[name]
    (tmp_path / name).write_text(text, "utf-8")
    assert read_prompts(tmp_path / name) == expected
    assert list(read_prompts(tmp_path / name)) == list(expected)


def test_a_folder_holds_a_prompt_in_each_file(tmp_path: Path) -> None:
    for name, text in {
        "b.py": "import os\n",
        "a.txt": "two\nlines",
        ".hidden": "x",
        "empty": "",
    }.items():
        (tmp_path / name).write_text(text)
    assert list(read_prompts(tmp_path).items()) == [
        ("a.txt", "two\nlines"),
        ("b.py", "import os\n"),
    ]


BAD = {
    "a.jsonl": ('{"prompt": "x"}\n{"prompt": \n', "line 2 is invalid JSON"),
    "b.jsonl": ('{"answer": "x"}\n', "line 1 has no prompt"),
    "c.jsonl": ('{"turns": []}\n', "turns is not a non-empty string"),
    "d.json": ('{"prompt": "x"}', "is not a JSON list"),
    "e.json": ('["x", 3]', "entry 2 is not a non-empty string"),
    "f.json": ("[" * 100_000, "is invalid JSON"),
    "g.txt": ("\n \n", "holds no prompt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_the_place(name: str, tmp_path: Path) -> None:
    text, message = BAD[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidRequest, match=message):
        read_prompts(tmp_path / name)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InvalidRequest, match="not UTF-8"):
        read_prompts(tmp_path / "x.txt")


def test_a_long_text_keeps_its_end() -> None:
    tokenizer = load_tokenizer(str(SHIPPED))
    texts = {"short": "import os\n", "long": "x = 1\n" * 100}
    short, long = encode_prompts(tokenizer, texts, 20)
    assert tokenizer.decode(list(short.tokens)) == "import os\n"
    assert list(long.tokens) == tokenizer.encode(texts["long"])[-20:]


def test_the_chat_prompts_that_ship_are_of_spec_benchs_categories() -> None:
    names = list(read_prompts(CHAT_PROMPTS))
    found = Counter(map(category, names))
    assert found.pop(MT_BENCH) == 9
    assert found == dict.fromkeys(("maths", "translation", "summarisation", "qa", "rag"), 3)


def test_llama_cpp_needs_a_gguf_file(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert gguf_of(str(file)) == file
    for other in (str(tmp_path), "nothing.gguf", "smollm2-135m-not-pulled"):
        with pytest.raises(InvalidRequest, match="is no GGUF file"):
            gguf_of(other)


def test_a_sample_depends_on_the_seed_alone() -> None:
    every = [Prompt(f"file.txt:{number}", (number,)) for number in range(20)]
    some = sample_prompts(every, 5, seed=1)
    assert len({prompt.name for prompt in some}) == 5
    assert some == sample_prompts(every, 5, seed=1) != sample_prompts(every, 5, seed=2)
    assert sorted(sample_prompts(every, 50, seed=1), key=lambda prompt: prompt.tokens) == every


def test_a_sample_holds_the_categories_in_equal_parts() -> None:
    every = [Prompt(f"{name}:{n}", (n,)) for name in ("qa", "rag", "maths") for n in range(40)]
    every += [Prompt("rare:1", (1,))]
    some = sample_prompts(every, 10, seed=3)
    assert Counter(prompt.category for prompt in some) == {
        "qa": 3,
        "rag": 3,
        "maths": 3,
        "rare": 1,
    }
    assert {prompt.category for prompt in some[:4]} == {"qa", "rag", "maths", "rare"}


def test_categories_name_their_prompts_and_mt_bench_is_one(tmp_path: Path) -> None:
    lines = [
        {"category": "roleplay", "turns": ["You are a ship."]},
        {"category": "qa", "turns": ["Why?"]},
        {"question": "How?"},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert list(read_prompts(tmp_path / "x.jsonl")) == ["mt-bench:1", "qa:2", "x.jsonl:3"]


def test_a_chat_template_makes_the_prompt_a_message() -> None:
    tokenizer = load_tokenizer(str(SHIPPED))
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (prompt,) = encode_prompts(tokenizer, {"x": "import os"}, 64)
    assert tokenizer.decode(list(prompt.tokens)) == "<user>import os<assistant>"


def test_the_prompt_sets_of_others_are_read(shared: Path) -> None:
    counts = {
        file.name: len(read_prompts(file))
        for file in (shared / "prompts").iterdir()
        if file.suffix in (".json", ".jsonl")
    }
    assert counts
    for name, count in counts.items():
        text = (shared / "prompts" / name).read_text("utf-8")
        assert count == (
            len(json.loads(text)) if name.endswith(".json") else len(text.strip().split("\n"))
        )
