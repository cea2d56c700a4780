"""Generated text reaches a file unchanged, and a terminal or an encoding that lacks it safely."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from transformers import AutoTokenizer, PhiConfig, PhiForCausalLM

from actors.cli.views.generation_view import Progress, Stream
from actors.launch.command_line import run
from runtime.core.messages import Chunk
from tests.support.command import assert_one_error_line, outrider
from tests.support.pair import SHIPPED, save_tokenizer

PIECES = ("\t", "a", " b", "\n", "\r", "\x0c", "\x1b")


@pytest.fixture(scope="module")
def tabs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of tabs, returns, form feeds and escapes, all equally probable."""
    folder = tmp_path_factory.mktemp("models") / "tabs"
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=256,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.fill_(-30.0)
        model.lm_head.bias[[tokenizer.encode(piece)[0] for piece in PIECES]] = 0.0
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_a_file_gets_the_text_of_json_and_one_newline(
    tabs: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    call = ["generate", "--target", tabs, "--speculation", "off", "--prompt", "def", "--in-process"]
    call += ["--temperature", "1", "--seed", "3", "--max-tokens", "60"]
    capsysbinary.readouterr()  # saving has shown a progress bar
    assert outrider(monkeypatch, *call, "--json") == 0
    text = json.loads(capsysbinary.readouterr().out)["text"]
    assert set(text) == set("".join(PIECES))
    assert outrider(monkeypatch, *call) == 0
    assert capsysbinary.readouterr().out == text.encode() + b"\n"


def test_a_terminal_gets_colours_and_nothing_that_moves_its_cursor() -> None:
    stream = Stream(Progress(quiet=True), quiet=False)
    shown = io.StringIO()
    stream.console = Console(file=shown, force_terminal=True, color_system="standard", width=20)
    pieces = ("\ta", "b\r\x1b]52;c;ZXZpbA==\x07", "c\x9bJ\x0c\n")
    stream.show(Chunk(pieces, (1, 2, 3), drafters=("d", "", "d")))
    assert shown.getvalue() == (
        "\x1b[32m\ta\x1b[0m\x1b[1;37mb]52;c;ZXZpbA==\x1b[0m\x1b[32mcJ\x1b[0m\n"
    )
    assert stream.text == "".join(pieces)


def printed(monkeypatch: pytest.MonkeyPatch, text: str, encoding: str, errors: str) -> bytes:
    """Returns what a command writes that prints `text` to such an output."""
    written = io.BytesIO()
    stdout = io.TextIOWrapper(written, encoding, errors)
    app = typer.Typer()

    @app.command()
    def show() -> None:
        Console(soft_wrap=True, highlight=False).print(text)
        sys.stdout.write(text + "\n")

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as ended:
            run(app, [])
    stdout.flush()
    assert not ended.value.code
    return written.getvalue()


@pytest.mark.parametrize(
    ("encoding", "errors", "shown"),
    [
        ("ascii", "strict", rb"caf\xe9 \u2192 \udcff"),
        ("ascii", "surrogateescape", rb"caf\xe9 \u2192 \udcff"),
        ("latin-1", "strict", b"caf\xe9 " + rb"\u2192 \udcff"),
        ("utf-8", "strict", "café → ".encode() + rb"\udcff"),
        ("ascii", "replace", b"caf? ? ?"),
    ],
)
def test_all_commands_escape_what_the_output_cannot_encode(
    monkeypatch: pytest.MonkeyPatch, encoding: str, errors: str, shown: bytes
) -> None:
    assert printed(monkeypatch, "café → \udcff", encoding, errors) == (shown + b"\n") * 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["generate", "--prompt", "d\udcff"], "prompt is not UTF-8 (character 1)"),
        (["generate", "--prompt", "d", "--stop", "d\udcff"], r"stop 'd\udcff'"),
    ],
)
def test_arguments_that_are_not_utf8(
    arguments: list[str],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert outrider(monkeypatch, *arguments) == 2
    assert_one_error_line(named, capsys)
