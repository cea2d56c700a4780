"""Bad input ends a command with one line, which names the value and the way out."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from actors.drafter import DraftActor
from runtime.config import DrafterConfig, Placement
from runtime.core.errors import Unavailable
from tests.support.command import assert_one_error_line, outrider
from tests.support.pair import SHIPPED, save_model, save_tokenizer
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", context=64)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--prompt", ""], "empty"),
        ([], "--prompt"),
        (["--prompt", "a", "--prompt-file", "b"], "exactly one"),
        (["--prompt-file", "/nowhere/prompt.txt"], "/nowhere/prompt.txt"),
        (["--prompt", "a", "--target", "/nowhere/model"], "/nowhere/model"),
        (["--prompt", "a", "--temperature", "-1"], "temperature -1"),
        (["--prompt", "a", "--temperature", "nan"], "temperature nan"),
        (["--prompt", "a", "--top-p", "-1"], "top_p -1"),
        (["--prompt", "a", "--top-p", "inf"], "top_p inf"),
        (["--prompt", "a", "--min-p", "1.5"], "min_p 1.5"),
        (["--prompt", "a", "--top-k", "-3"], "top_k -3"),
        (["--prompt", "a", "--max-tokens", "0"], "max_tokens 0"),
        (["--prompt", "a", "--max-tokens", "five"], "--max-tokens"),
        (["--prompt", "a", "--min-tokens", "500"], "min_tokens 500"),
        (["--prompt", "a", "--seed", "99999999999999999999"], "seed 99999999999999999999"),
        (["--prompt", "a", "--stop", ""], "stop"),
        (["--prompt", "a", "--drafters", "1000"], "1000"),
        (["--prompt", "a", "--dtype", "float8"], "float8"),
        (["--prompt", "a", "--speculation", "maybe"], "maybe"),
        (["--prompt", "a", "--no-such-flag"], "--no-such-flag"),
        (["--prompt", "a", "--deployment", "/nowhere/file.yaml"], "/nowhere/file.yaml"),
        (
            ["--prompt", "a", "--deployment", "file.yaml", "--draft", "ngram"],
            "either a file or --draft",
        ),
    ],
)
def test_one_line_names_the_value(
    arguments: list[str],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert outrider(monkeypatch, "generate", *arguments) == 2
    assert_one_error_line(named, capsys)


def test_standard_input_that_is_not_utf8(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outrider(monkeypatch, "generate", "--prompt-file", "-", stdin=b"abc\xff") == 2
    assert_one_error_line("byte 3", capsys)


def test_a_prompt_over_the_context(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = " ".join(["return"] * 100)
    assert (
        outrider(
            monkeypatch,
            "generate",
            "--target",
            tiny,
            "--draft",
            "ngram",
            "--prompt",
            prompt,
            "--max-tokens",
            "4",
        )
        == 2
    )
    assert_one_error_line("context 64", capsys)


def test_an_output_over_the_context(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        outrider(
            monkeypatch,
            "generate",
            "--target",
            tiny,
            "--draft",
            "ngram",
            "--prompt",
            "return",
            "--max-tokens",
            "64",
        )
        == 2
    )
    assert_one_error_line("max_tokens 64", capsys)


def test_a_folder_without_tokenizer(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    assert (
        outrider(monkeypatch, "generate", "--target", tmp_path, "--draft", "ngram", "--prompt", "a")
        == 2
    )
    assert_one_error_line("tokenizer.json", capsys)


def test_a_folder_with_pickled_weights(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    save_tokenizer(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert (
        outrider(monkeypatch, "generate", "--target", tmp_path, "--draft", "ngram", "--prompt", "a")
        == 2
    )
    assert_one_error_line("pytorch_model.bin", capsys)


def test_a_model_with_code_of_its_own(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = json.loads((tiny / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(settings | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}})
    )
    save_tokenizer(tmp_path)
    assert (
        outrider(monkeypatch, "generate", "--target", tmp_path, "--draft", "ngram", "--prompt", "a")
        == 2
    )
    assert_one_error_line("auto_map", capsys)


def test_a_draft_of_another_vocabulary(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = save_model(tmp_path / "other", context=64)
    tokenizer = json.loads((SHIPPED / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["Ġdef"], vocabulary["Ġreturn"] = vocabulary["Ġreturn"], vocabulary["Ġdef"]
    (draft / "tokenizer.json").write_text(json.dumps(tokenizer))
    capsys.readouterr()  # saving has shown a progress bar
    assert (
        outrider(
            monkeypatch,
            "generate",
            "--target",
            tiny,
            "--draft",
            draft,
            "--prompt",
            "a",
            "--max-tokens",
            "4",
        )
        == 2
    )
    assert_one_error_line(str(draft), capsys)


def test_an_address_of_no_cluster(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        call = (
            "generate",
            "--target",
            tiny,
            "--draft",
            "ngram",
            "--prompt",
            "a",
            "--max-tokens",
            "4",
            "--address",
            address,
        )
        assert outrider(monkeypatch, *call) == 2
    assert_one_error_line(address, capsys)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"intermediate_size": 72}, "of other shapes than its config.json says"),
        ({"max_position_embeddings": 6}, "has a context of 6 tokens"),
        ({"num_hidden_layers": 3}, "lacks 9 of its weights"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "serve"])
def test_a_model_that_does_not_load_is_told_before_ray_starts(
    command: str,
    change: dict[str, int],
    named: str,
    nobody: None,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(tiny, folder)
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(settings | change), "utf-8")
    monkeypatch.setattr("ray.init", None)
    monkeypatch.setattr("actors.launch.local_ray.start", None)
    prompt = ["--prompt", "a", "--max-tokens", 2] if command == "generate" else ["--port", 0]
    for models in (("--target", folder, "--draft", "ngram"), ("--target", tiny, "--draft", folder)):
        assert outrider(monkeypatch, command, *models, *prompt) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert str(folder) in captured.err
        assert named in captured.err
        assert ": " in captured.err.partition(named)[2]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--device", "cuda"], "device cuda not found"),
        (["--api-key-file", "/nowhere/keys"], "/nowhere/keys"),
        (["--port", "TAKEN"], "choose another port"),
    ],
)
def test_what_the_gateway_and_the_device_lack_is_told_before_ray_starts(
    arguments: list[str],
    named: str,
    nobody: None,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("ray.init", None)
    monkeypatch.setattr("actors.launch.local_ray.start", None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    call = ["serve", "--target", tiny, "--draft", "ngram"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        given = [port if word == "TAKEN" else word for word in arguments]
        ports = [] if "--port" in given else ["--port", "0"]
        assert outrider(monkeypatch, *call, *given, *ports) == 2
    assert_one_error_line(named, capsys)


def test_ray_that_cannot_start(tiny: Path, tmp_path: Path) -> None:
    """Ray reads its folder when it is imported, so this runs in a process of its own."""
    (tmp_path / "file").touch()
    call = [
        "generate",
        "--target",
        str(tiny),
        "--draft",
        "ngram",
        "--prompt",
        "a",
        "--max-tokens",
        "4",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "from actors.cli import main; main()", *call],
        env=os.environ | {"RAY_TMPDIR": str(tmp_path / "file")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Ray does not start" in done.stderr.splitlines()[-1]
    assert "--in-process" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_no_port_to_be_had(tiny: Path) -> None:
    with pytest.raises(Unavailable, match=r"203\.0\.113\.1"):
        DraftActor(
            DrafterConfig(name="d", method="ngram", placement=Placement(listen="203.0.113.1")),
            str(tiny),
        ).start()


@pytest.mark.parametrize(
    "drafts", [["--draft", "ngram"], ["--draft", "TARGET"], ["--speculation", "off"]], ids="/".join
)
def test_json_is_one_object_and_the_same_tokens_whatever_drafts(
    drafts: list[str],
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common: list[object] = [
        "generate",
        "--target",
        tiny,
        "--prompt",
        "def f(",
        "--max-tokens",
        40,
        "--temperature",
        0.7,
        "--seed",
        4,
    ]
    common += ["--json", "--in-process"]
    assert (
        outrider(
            monkeypatch, *common, *(str(tiny) if word == "TARGET" else word for word in drafts)
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert outrider(monkeypatch, *common, "--speculation", "off") == 0
    plain = json.loads(capsys.readouterr().out)
    assert {key: found[key] for key in ("text", "token_ids", "finish_reason", "usage", "seed")} == {
        key: plain[key] for key in ("text", "token_ids", "finish_reason", "usage", "seed")
    }
    assert len(found["token_ids"]) == found["usage"]["completion_tokens"]
    assert found["metrics"]["tokens_per_second"] > 0
    assert found["metrics"]["speculative_decoding"]["mean_acceptance_length"] >= 1


def test_doctor_measures_a_pair(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outrider(monkeypatch, "doctor", "--target", tiny, "--draft", tiny) == 0
    shown = capsys.readouterr().out
    assert "The pair matches: 4096 tokens" in shown
    assert "first 1: 1.00" in shown
    assert "kernel      float32, " in shown


def test_without_arguments_there_is_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outrider(monkeypatch) == 0
    assert "generate" in capsys.readouterr().out
