"""Shows a download: as a bar at a terminal, else as a line for each stage."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

from runtime.models.catalogue import CATALOGUE, CatalogueModel


class DownloadProgress:
    """Writes to standard error unless `quiet`."""

    def __init__(self, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> "DownloadProgress":
        if self._console.is_terminal:
            self._progress.start()
        return self

    def note(self, what: str) -> None:
        self._progress.update(self._task, description=what, total=None)
        if not self._console.is_terminal:
            self._console.print(what, soft_wrap=True)

    def report(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._progress.stop()


def catalogue_table() -> Table:
    """Returns the models that can be pulled by a short name."""
    found = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("model", "what", "licence", "size", "from", "here"):
        found.add_column(name)
    for model in CATALOGUE.values():
        found.add_row(
            model.name,
            model.summary,
            model.licence,
            f"{model.size >> 20} MiB",
            model.requirement,
            "yes" if model.file().is_file() else "no",
        )
    return found


def catalogue_entry(model: CatalogueModel) -> dict[str, object]:
    """Returns one object of --json."""
    return {
        "name": model.name,
        "summary": model.summary,
        "licence": model.licence,
        "bytes": model.size,
        "source": model.requirement,
        "sha256": model.sha256,
        "here": model.file().is_file(),
    }
