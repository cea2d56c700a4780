"""Follows the fleet through `outrider top --json`, one process for all readings."""

import json
import subprocess
import threading
from functools import partial
from typing import Any

from tests.system.cluster.hosts import await_

PATIENCE_S = 600.0


class Looks:
    """`command` runs `outrider top --json`, until `stop`."""

    def __init__(self, command: list[str]) -> None:
        self.running = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.count = 0
        self.last: dict[str, Any] = {}
        self.other: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def fleet(self) -> dict[str, Any]:
        """As it is now. Raises AssertionError where nothing is told any more."""
        before = self.count
        await_(
            lambda: self.count > before or not self.reader.is_alive(),
            "the next line of `outrider top`",
            PATIENCE_S,
        )
        assert self.count > before, f"`outrider top` has ended: {''.join(self.other)}"
        return self.last

    def ready(self, what: str) -> int:
        """How many "targets" or "drafters" take sessions."""
        return sum(actor["state"] == "ready" for actor in self.fleet()[what])

    def await_(self, what: str, count: int) -> None:
        """Until so many of them do."""
        await_(partial(self._has, what, count), f"{count} {what}", PATIENCE_S)

    def stop(self) -> None:
        self.running.kill()
        self.running.wait()

    def _has(self, what: str, count: int) -> bool:
        return self.ready(what) == count

    def _read(self) -> None:
        assert self.running.stdout is not None
        for line in self.running.stdout:
            if line.startswith("{"):
                self.last = json.loads(line)
                self.count += 1
            else:
                self.other.append(line)
