"""Runs the command `outrider` in this process and checks what it prints."""

import io
import sys

import pytest

from actors import cli


def outrider(monkeypatch: pytest.MonkeyPatch, *arguments: object, stdin: bytes = b"") -> int:
    """Runs the command in this process and returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["outrider", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def assert_one_error_line(named: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Asserts that the command printed one line of error and that it contains `named`."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("outrider: ")
    assert named in captured.err
