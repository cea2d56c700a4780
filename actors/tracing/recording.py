"""Records the targets and drafters of a deployment: `outrider serve --trace FILE`."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from actors.fleet import client
from actors.tracing.trace_reader import save_trace
from runtime.core.errors import InvalidRequest

TRACE_TIMEOUT_S = 60.0  # half an hour of a busy fleet is some hundred megabytes


def check_writable(file: Path) -> None:
    """Raises InvalidRequest if the file cannot be written, before anything is recorded."""
    if file.is_dir() or not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise InvalidRequest(
            f"cannot write the trace to {file}: give a file in a folder that exists", "trace"
        )


def record_until(file: Path, wait: Callable[[], object]) -> None:
    """Records until `wait` returns or is interrupted, and writes the trace; the deployment goes on.

    Raises Unavailable if the controller is gone by then.
    """
    client.ask_controller("recording", True)
    try:
        with suppress(KeyboardInterrupt):
            wait()
    finally:
        try:
            recordings = client.ask_controller("trace", timeout_s=TRACE_TIMEOUT_S)
        finally:
            client.ask_controller("recording", False)
        save_trace(file, recordings)
