"""A text table for the terminal and for Markdown."""

from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True, slots=True)
class Grid:
    """Cells of text. The first column and those in `words` are aligned left, all others right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[str, ...] = ()

    def is_left(self, column: str) -> bool:
        return column in (self.columns[0], *self.words)

    def markdown(self) -> str:
        lines = [
            self.columns,
            tuple("---" if self.is_left(column) else "---:" for column in self.columns),
            *self.rows,
        ]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def terminal(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        for column in self.columns:
            table.add_column(
                column, justify="left" if self.is_left(column) else "right", overflow="fold"
            )
        for row in self.rows:
            table.add_row(*row)
        return table
