"""Shows the progress of a job: as a bar at a terminal, else as a line every 10 s."""

import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from actors.jobs.index import Totals

LINE_PERIOD_S = 10.0  # between two lines without a terminal


class JobProgress:
    """Writes to standard error unless `quiet`. Rates are those since the first totals."""

    def __init__(self, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._progress = Progress(
            BarColumn(), TextColumn("{task.description}"), console=self._console, transient=True
        )
        self._task = self._progress.add_task("", total=None)
        self._began = self._shown = time.monotonic()
        self._first: Totals | None = None

    def __enter__(self) -> "JobProgress":
        if self._console.is_terminal:
            self._progress.start()
        return self

    def note(self, what: str) -> None:
        self._progress.update(self._task, description=what)

    def show(self, totals: Totals) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._began = totals, now
        text = progress_line(totals, self._first, now - self._began)
        self._progress.update(
            self._task, description=text, total=totals.items, completed=totals.done
        )
        if not self._console.is_terminal and now - self._shown >= LINE_PERIOD_S:
            self._shown = now
            self._console.print(text)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._progress.stop()


def progress_line(totals: Totals, first: Totals, seconds: float) -> str:
    """Returns one line of progress; `first` are the totals `seconds` ago."""
    parts = [f"{totals.done}/{totals.items} items"]
    if totals.failed:
        parts.append(f"{totals.failed} failed")
    if seconds > 0 and totals.done > first.done:
        rate = (totals.done - first.done) / seconds
        left = timedelta(seconds=round((totals.items - totals.done) / rate))
        parts += [
            f"{rate:.1f} items/s",
            f"{(totals.tokens - first.tokens) / seconds:.0f} tokens/s",
            f"{left} left",
        ]
    return ", ".join(parts)
