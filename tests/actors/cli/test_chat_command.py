"""`outrider chat` answers line after line, and forgets the oldest turns if the context is full."""

import asyncio
import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from actors.cli.commands.chat import Talker
from actors.cli.conversation import Conversation, answer_room
from actors.launch.serving import OpenService
from runtime.core.errors import InvalidRequest, Unavailable
from runtime.core.messages import NO_STATS, Chunk, Request
from runtime.core.sampling_params import SamplingParams
from runtime.models.loader import load_tokenizer
from tests.support.command import assert_one_error_line, outrider
from tests.support.gguf_files import CONTEXT, write_gguf
from tests.support.pair import SHIPPED, save_model
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def options(model: Path, *more: str) -> list[str]:
    return ["chat", "--in-process", "--target", str(model), "--max-tokens", "6", *more]


def test_each_line_gets_an_answer_that_drafts_do_not_change(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = b"import os\n\n  \ndef read(path):\nwhy?"
    found = []
    for switch in ("on", "off"):
        assert outrider(monkeypatch, *options(model, "--speculation", switch), stdin=lines) == 0
        shown = capfd.readouterr()
        found.append(shown.out)
        assert shown.err.count("tokens per step") == 3
        assert "cut after 6 tokens" in shown.err
        assert "\x1b" not in shown.out + shown.err
    assert found[0] == found[1]
    assert found[0].count("\n") >= 3


def test_a_seed_makes_the_answers_reproducible(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    found = []
    for seed in ("1", "1", "2"):
        arguments = options(model, "--temperature", "2", "--seed", seed, "--system", "Be brief.")
        assert outrider(monkeypatch, *arguments, stdin=b"import os\n") == 0
        found.append(capfd.readouterr().out)
    assert found[0] == found[1] != found[2]


def test_a_full_context_forgets_and_says_so(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = b"import os\n" + b"return " * 100 + b"\n" + b"return " * 120 + b"\n" + b"x " * 300
    assert outrider(monkeypatch, *options(model), stdin=lines) == 0
    shown = capfd.readouterr()
    assert "of the oldest questions are forgotten" in shown.err
    assert "shorten it, or lower --max-tokens" in shown.err
    assert shown.err.count("tokens per step") == 3


@pytest.mark.parametrize(
    ("arguments", "stdin", "named"),
    [
        (["--max-tokens", str(CONTEXT)], b"", f"max_tokens {CONTEXT}"),
        (["--max-tokens", "0"], b"", "max_tokens 0"),
        (["--temperature", "-1"], b"", "temperature -1"),
    ],
)
def test_bad_options_are_one_line(
    arguments: list[str],
    stdin: bytes,
    named: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert outrider(monkeypatch, *options(model, *arguments), stdin=stdin) == 2
    assert_one_error_line(named, capsys)


def test_a_model_without_a_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(tmp_path / "plain")
    capsys.readouterr()
    assert outrider(monkeypatch, "chat", "--target", folder) == 2
    assert_one_error_line("has no chat template", capsys)


def test_without_a_model_it_says_what_to_pull(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert outrider(monkeypatch, "chat") == 2
    assert_one_error_line("run `outrider pull smollm2-135m`", capsys)


def conversation(context: int, max_tokens: int) -> Conversation:
    tokenizer = load_tokenizer(str(SHIPPED))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    return Conversation(tokenizer, context, max_tokens)


def test_the_system_message_and_the_newest_turns_stay() -> None:
    talk = conversation(60, 8)
    talk.messages.append({"role": "system", "content": "brief"})
    dropped = 0
    for number in range(12):
        prompt, gone = talk.ask(f"question {number}")
        talk.answered(f"answer {number}")
        dropped += gone
        assert len(prompt) <= 60 - 8
    roles = [message["role"] for message in talk.messages]
    assert roles == ["system", *["user", "assistant"] * (len(roles) // 2)]
    assert talk.messages[-2]["content"] == "question 11"
    assert dropped == 12 - len(roles) // 2 > 0


def test_a_question_that_is_too_long_is_not_kept() -> None:
    talk = conversation(60, 8)
    talk.ask("hello")
    talk.answered("hi")
    before = list(talk.messages)
    with pytest.raises(InvalidRequest, match="leaves 52 beside an answer of 8"):
        talk.ask("return " * 100)
    assert talk.messages == before


def test_the_room_for_an_answer() -> None:
    assert answer_room(None, 512, 8192) == 512
    assert answer_room(None, 512, 256) == 128
    assert answer_room(255, 512, 256) == 255


class Endless:
    """A service that never ends an answer to the prompt (0,), and answers others at once."""

    def __init__(self) -> None:
        self.closed = 0

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        try:
            yield chunk()
            if request.prompt == (0,):
                await asyncio.Event().wait()
            yield replace(chunk(), finish_reason="error" if request.prompt == (2,) else "stop")
        finally:
            self.closed += 1


def chunk() -> Chunk:
    return Chunk(tokens=(1,), pieces=("a",), drafters=("",), stats=NO_STATS)


def ask(*prompt: int) -> Request:
    return Request(f"session-{prompt}", prompt, SamplingParams())


def test_ctrl_c_ends_the_answer_and_not_the_chat() -> None:
    service = Endless()

    @contextlib.asynccontextmanager
    async def opener() -> AsyncIterator[Endless]:
        yield service

    def interrupt(_: Chunk) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # xdist ignores it
    try:
        talk(opener, service, interrupt)
    finally:
        signal.signal(signal.SIGINT, before)


def talk(opener: OpenService, service: Endless, interrupt: Callable[[Chunk], None]) -> None:
    with Talker(opener) as talker:
        assert talker.answer(ask(0), interrupt) is None
        assert service.closed == 1
        last = talker.answer(ask(1), lambda _: None)
        assert last is not None
        assert last.finish_reason == "stop"
        with pytest.raises(Unavailable):
            talker.answer(ask(2), lambda _: None)


def test_at_a_terminal(model: Path) -> None:
    """Ctrl-C at the prompt and Ctrl-D, in a process at a terminal of its own."""
    ours, theirs = pty.openpty()
    command = (
        "import fcntl, signal, termios; "
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0); "  # so Ctrl-C reaches it
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # xdist ignores it
        "from actors.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", command, *options(model)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        cwd=ROOT,
    )
    os.close(theirs)
    try:
        shown = read_until(ours, b"> ")
        os.write(ours, b"import os\n")
        shown += read_until(ours, b"tokens per step", b"> ")
        assert b"\x1b[" in shown
        press(ours, b"\x03", b"> ")
        os.write(ours, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def press(terminal: int, key: bytes, mark: bytes) -> None:
    """Presses a key until the mark comes: readline loses a signal that comes before it waits."""
    found, until = b"", time.monotonic() + 120
    os.write(terminal, key)
    while mark not in found:
        assert time.monotonic() < until, found
        if select.select([terminal], [], [], 5.0)[0]:
            found += os.read(terminal, 4096)
        else:
            os.write(terminal, key)


def read_until(terminal: int, *marks: bytes) -> bytes:
    """Reads until each mark has come after the one before it."""
    found, place, until = b"", 0, time.monotonic() + 120
    for mark in marks:
        while (at := found.find(mark, place)) < 0:
            ready, _, _ = select.select([terminal], [], [], until - time.monotonic())
            assert ready, found
            found += os.read(terminal, 4096)
        place = at + len(mark)
    return found
