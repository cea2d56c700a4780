"""`make demo` shows the chat model if it can be had, and the bundled pair if not."""

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from actors.cli import demo
from runtime.core.errors import ModelRefused
from runtime.models.catalogue import CATALOGUE, CHAT_MODEL
from tests.support.gguf_files import write_gguf


def test_the_chat_model_with_and_without_drafts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    content = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    tiny = replace(CATALOGUE[CHAT_MODEL], sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(CATALOGUE, CHAT_MODEL, tiny)
    tiny.file().parent.mkdir(parents=True)
    tiny.file().write_bytes(content)
    # What ships was trained for the real model.
    monkeypatch.setattr(demo, "default_drafts", lambda _: ("token-recycling",))
    monkeypatch.setitem(demo.MAX_TOKENS, "chat", 8)
    monkeypatch.setattr(sys, "argv", ["demo", "--in-process"])
    demo.main()
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("same text as the target alone") == len(demo.QUESTIONS) * 2
    assert "token-recycling" in shown
    assert "speed-up" in shown


def test_without_a_network_it_says_so_and_takes_the_bundled_pair(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class TookBundledPair(Exception):
        pass

    def refuse(*_: object) -> Path:
        raise ModelRefused("pip cannot download it: check the network")

    def take(*_: object, **__: object) -> demo.Demo:
        raise TookBundledPair

    monkeypatch.setattr(demo, "pull", refuse)
    monkeypatch.setattr(demo, "bundled_demo", take)
    monkeypatch.setattr(sys, "argv", ["demo"])
    with pytest.raises(TookBundledPair):
        demo.main()
    shown = " ".join(capsys.readouterr().out.split())
    assert "check the network. This demo uses the bundled pair instead." in shown
