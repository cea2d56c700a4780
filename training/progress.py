"""The progress of a training: a bar on a terminal, otherwise a line now and then."""

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training.loop import StepCallback

LINE_PERIOD_S = 10.0  # without a terminal


class ProgressBar:
    """A progress bar on standard error with the time left; without a terminal, a line now and
    then."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task("", total=None)
        self._shown = time.monotonic()

    def __enter__(self) -> "ProgressBar":
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def note(self, what: str) -> None:
        self._begin(what, None)

    def counts(self, what: str, total: int) -> Callable[[int], None]:
        """Return a function that advances the bar by a number of finished items."""
        self._begin(what, total)
        return lambda more: self._show(what, more)

    def steps(self, total: int) -> StepCallback:
        self._begin("training", total)

        def tell(done: int, loss: float) -> None:
            more = done - int(self._progress.tasks[0].completed)
            self._show(f"training, loss {loss:.3f}" if done else "training", more)

        return tell

    def _begin(self, what: str, total: int | None) -> None:
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        self._task = self._progress.add_task(what, total=total)

    def _show(self, what: str, more: int) -> None:
        self._progress.update(self._task, description=what, advance=more)
        task, now = self._progress.tasks[0], time.monotonic()
        over = task.completed == task.total
        if not self._console.is_terminal and (now - self._shown >= LINE_PERIOD_S or over):
            self._shown = now
            self._console.print(f"{what}, {task.completed:.0f} of {task.total or 0:.0f}")
