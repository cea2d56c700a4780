"""Owns the process that forks a process for each grammar."""

import contextlib
import json
import socket
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

from runtime.models import grammar_worker
from runtime.models.grammar_worker import MASK, receive, send

START_TIMEOUT_S = 60.0  # for a machine that is busy; it takes about a second
STOP_TIMEOUT_S = 5.0


class ForkServer:
    """Forks a process for each grammar. It ends when closed, garbage collected or orphaned."""

    def __init__(self, setup: dict[str, Any]) -> None:
        """Starts the process. Raises ValueError if it refuses `setup`, OSError if it dies."""
        ours, theirs = socket.socketpair()
        with theirs:
            program = [sys.executable, "-I", str(Path(grammar_worker.__file__))]
            self.process = subprocess.Popen(
                [*program, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # it ends its whole group; the owner handles Ctrl-C
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # it might quote grammars
            )
        self._control = ours
        self.close = weakref.finalize(self, stop, self.process, ours)
        ours.settimeout(START_TIMEOUT_S)
        try:
            send(ours, json.dumps(setup).encode())
            data = receive(ours)
        except OSError:
            self.close()
            raise
        if data is None or data[:1] != MASK:
            self.close()
            raise (
                OSError("the grammar server died")
                if data is None
                else ValueError(data[1:].decode())
            )

    def fork(self) -> socket.socket:
        """Returns a channel to a new process. Raises OSError if the server is dead."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self._control, [b"\0"], [theirs.fileno()])
        except OSError:
            ours.close()
            raise
        return ours


def stop(process: subprocess.Popen[bytes], control: socket.socket) -> None:
    """Returns when the process is gone, and its children with it."""
    control.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    process.kill()
    process.wait()
