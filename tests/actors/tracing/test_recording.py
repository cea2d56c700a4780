"""`serve --trace` records from its start to the interruption and leaves the service as it was."""

from pathlib import Path
from typing import Any

import pytest

from actors.fleet import client
from actors.tracing.recording import check_writable, record_until
from actors.tracing.trace_reader import read_trace
from runtime.core.errors import InvalidRequest
from runtime.telemetry.tracing import COMPUTE, TARGET, Trace


class Recorder:
    """A controller with one target."""

    def __init__(self) -> None:
        self.target = Trace(TARGET)
        self.asked: list[tuple[object, ...]] = []

    def ask(self, method: str, *arguments: object, timeout_s: float | None = 1.0) -> Any:
        self.asked.append((method, *arguments))
        return [self.target.drain()] if method == "trace" else None


def interrupted() -> None:
    raise KeyboardInterrupt


def test_ctrl_c_ends_the_recording_and_not_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller, file = Recorder(), tmp_path / "trace.json"

    def serve() -> None:
        controller.target.span(TARGET, COMPUTE, 1.0, 2.0, rows=3.0)
        interrupted()

    monkeypatch.setattr(client, "ask_controller", controller.ask)
    record_until(file, serve)
    assert controller.asked == [("recording", True), ("trace",), ("recording", False)]
    assert [block.name for block in read_trace(file).blocks[TARGET]] == [COMPUTE]


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_started(
    tmp_path: Path,
) -> None:
    check_writable(tmp_path / "new.json")
    for file in (tmp_path, tmp_path / "no" / "trace.json"):
        with pytest.raises(InvalidRequest, match="folder that exists"):
            check_writable(file)
