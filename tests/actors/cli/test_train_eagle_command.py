"""`outrider train eagle` and `train block` turn flags into drafters."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.chatty import save_chatty
from tests.support.command import outrider
from tests.support.pair import save_model

SMALL = ("--steps", 2, "--batch", 2, "--context", 24, "--own", 40)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return save_model(folder, seed=3, num_hidden_layers=3, context=64)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text("".join(f"def number_{index}():\n    return {index}\n" for index in range(400)))
    return file


def test_an_eagle_learns_from_the_targets_own_conversations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("training.conversations.ROWS", 32)
    target = save_chatty(tmp_path / "chatty", context=128)
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"turns": ["Hello?", "And then?"]}\n{"prompt": "Who are you?"}\n')
    command = ("train", "eagle", "--target", target, "--prompts", asked, "--intermediate", 32)
    sizes = ("--vocabulary", 128, "--steps", 2, "--batch", 2, "--context", 96, "--own", 1500)
    assert outrider(monkeypatch, *command, "--out", tmp_path / "a", *sizes) == 0
    told = capsys.readouterr()
    assert "writing conversations with the target" in told.err
    assert "its own conversations" in told.out
    assert asked.name in told.out
    settings = json.loads((tmp_path / "a" / "config.json").read_text())["settings"]
    assert settings["layers"] == [1, 2]
    assert settings["draft_vocabulary"] == 128
    monkeypatch.setattr("training.conversations.write_texts", None)  # they are cached
    assert outrider(monkeypatch, *command, "--out", tmp_path / "b", *sizes) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(bool((one[name] == two[name]).all()) for name in one)


def test_an_eagle_of_a_target_without_a_chat_template_learns_from_data(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, data: Path, tmp_path: Path
) -> None:
    command = ("train", "eagle", "--target", tiny, "--data", data, "--out", tmp_path / "a")
    assert outrider(monkeypatch, *command, *SMALL, "--intermediate", 32, "--vocabulary", 99) == 0
    assert "99 tokens, which are" in (tmp_path / "a" / "README.md").read_text()


def test_a_block_drafter_is_trained_as_an_eagle_is(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, data: Path, tmp_path: Path
) -> None:
    command = ("train", "block", "--target", tiny, "--data", data, "--out", tmp_path / "a")
    sizes = ("--intermediate", 32, "--vocabulary", 99, "--places", 3, "--rank", 4)
    assert outrider(monkeypatch, *command, *SMALL, *sizes) == 0
    assert "99 tokens, which are" in (tmp_path / "a" / "README.md").read_text()
    settings = json.loads((tmp_path / "a" / "config.json").read_text())["settings"]
    assert (settings["places"], settings["rank"], settings["draft_vocabulary"]) == (3, 4, 99)


@pytest.mark.parametrize(
    ("method", "flags", "says"),
    [
        ("eagle", ("--layers", 2, "--layers", 1), "layers 2, 1 are invalid"),
        ("eagle", ("--layers", 9), "from 0 to 3"),
        ("eagle", ("--vocabulary", 0), "vocabulary"),
        ("eagle", ("--unroll", 99), "unroll"),
        ("eagle", ("--prompts", "/nowhere.jsonl"), "cannot read /nowhere.jsonl"),
        ("block", ("--places", 1), "places 1"),
        ("block", ("--rank", 0), "rank 0"),
    ],
)
def test_a_drafter_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny: Path,
    data: Path,
    tmp_path: Path,
    method: str,
    flags: tuple[object, ...],
    says: str,
) -> None:
    command = ("train", method, "--target", tiny, "--data", data, "--out", tmp_path / "a")
    assert outrider(monkeypatch, *command, *SMALL, *flags) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
