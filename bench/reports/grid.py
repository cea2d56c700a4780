"""A text table for the terminal and for Markdown."""

from dataclasses import dataclass, replace

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

    def without_empty_columns(self) -> "Grid":
        """Return the grid without the columns in which no row has a value."""
        kept = [
            place
            for place in range(len(self.columns))
            if not self.rows or any(row[place] != "-" for row in self.rows)
        ]
        return replace(
            self,
            columns=tuple(self.columns[place] for place in kept),
            rows=tuple(tuple(row[place] for place in kept) for row in self.rows),
        )

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
