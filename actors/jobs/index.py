"""What a job has done so far, in SQLite: one row for the job, one for each item. What is committed survives the loss of power."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from actors.gateway.errors import plain
from actors.jobs.items import Answer
from runtime.errors import InvalidRequest, Unavailable

PATIENCE = 30.0  # seconds for another process, which reads or cancels, to be done
FAILED = 400  # an HTTP status from here on is an error
SCHEMA = """
CREATE TABLE job (
  id TEXT NOT NULL, source TEXT NOT NULL, output TEXT NOT NULL, fingerprint TEXT NOT NULL, created REAL NOT NULL,
  position INTEGER NOT NULL DEFAULT 0, finished INTEGER NOT NULL DEFAULT 0, cancelled INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE items (
  line INTEGER PRIMARY KEY, custom_id TEXT NOT NULL UNIQUE,
  status INTEGER, tokens INTEGER NOT NULL DEFAULT 0, attempts INTEGER NOT NULL DEFAULT 0, position INTEGER
);
CREATE INDEX unanswered ON items (line) WHERE status IS NULL;
"""


@dataclass(frozen=True, slots=True)
class Record:
    """What a job is. `fingerprint` is that of the source's bytes; `created` in seconds since 1970."""

    id: str
    source: str
    output: str
    fingerprint: str
    created: float


@dataclass(frozen=True, slots=True)
class Kept:
    """An item that has its answer. `position`: where the output has it."""

    custom_id: str
    status: int
    tokens: int
    attempts: int
    position: int


@dataclass(frozen=True, slots=True)
class Totals:
    """`failed` counts the answers that are errors, among those that are `done`."""

    items: int
    done: int
    failed: int
    tokens: int

    def plus(self, answers: Sequence[Answer]) -> "Totals":
        failed = sum(answer.status >= FAILED for answer in answers)
        return Totals(self.items, self.done + len(answers), self.failed + failed, self.tokens + sum(answer.tokens for answer in answers))


class Index:
    """All methods may be called from any thread, by one at a time. Raises Unavailable where SQLite cannot use the folder."""

    def __init__(self, file: Path) -> None:
        with _explained(file):
            self._base = sqlite3.connect(file, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
            self._base.execute("PRAGMA journal_mode = WAL")
            self._base.execute("PRAGMA synchronous = FULL")  # WAL's default would lose the last commits with the power
        self._file = file

    def close(self) -> None:
        self._base.close()

    def record(self) -> Record | None:
        """None: no job was begun here."""
        with _explained(self._file):
            if not self._base.execute("SELECT 1 FROM sqlite_master WHERE name = 'job'").fetchall():
                return None
            return Record(*self._base.execute("SELECT id, source, output, fingerprint, created FROM job").fetchone())

    @contextmanager
    def creating(self) -> Iterator[None]:
        """What `add` and `name` do inside is done together when the block ends, or not at all."""
        with self._transaction():
            for statement in SCHEMA.split(";"):
                self._base.execute(statement)
            yield

    def add(self, line: int, name: str) -> None:
        """Raises InvalidRequest for a custom_id that stands on two lines."""
        if not self._base.execute("INSERT OR IGNORE INTO items (line, custom_id) VALUES (?, ?)", (line, name)).rowcount:
            first = self._base.execute("SELECT line FROM items WHERE custom_id = ?", (name,)).fetchone()[0]
            raise InvalidRequest(f"line {line} has the custom_id of line {first}, {plain(name)!r}: give each its own", "custom_id")

    def name(self, record: Record) -> Record:
        """Raises InvalidRequest where no item was added."""
        if not self.totals().items:
            raise InvalidRequest(f"{record.source} has no items: give at least one line", "file")
        row = (record.id, record.source, record.output, record.fingerprint, record.created)
        self._base.execute("INSERT INTO job (id, source, output, fingerprint, created) VALUES (?, ?, ?, ?, ?)", row)
        return record

    def position(self) -> int:
        """How much of the output is known here to be right."""
        return int(self._one("SELECT position FROM job"))

    def unanswered(self) -> list[int]:
        """Lines, rising."""
        with _explained(self._file):
            return [line for (line,) in self._base.execute("SELECT line FROM items WHERE status IS NULL ORDER BY line")]

    def keep(self, kept: Sequence[Kept], position: int) -> None:
        """These have their answers, and the output is right up to `position`: both or neither."""
        with self._transaction():
            self._base.executemany(
                "UPDATE items SET status = ?, tokens = ?, attempts = attempts + ?, position = ? WHERE custom_id = ?",
                [(one.status, one.tokens, one.attempts, one.position, one.custom_id) for one in kept],
            )
            self._base.execute("UPDATE job SET position = ?", (position,))

    def totals(self) -> Totals:
        with _explained(self._file):
            counts = f"COUNT(*), COUNT(status), COALESCE(SUM(status >= {FAILED}), 0), COALESCE(SUM(tokens), 0)"
            return Totals(*self._base.execute(f"SELECT {counts} FROM items").fetchone())

    def finish(self) -> None:
        self._set("finished", 1)

    def finished(self) -> bool:
        return bool(self._one("SELECT finished FROM job"))

    def cancel(self, wanted: bool = True) -> None:
        """Whoever works on the job is asked to leave it; it can be taken up again."""
        self._set("cancelled", int(wanted))

    def cancelled(self) -> bool:
        return bool(self._one("SELECT cancelled FROM job"))

    def _one(self, query: str) -> int:
        with _explained(self._file):
            return int(self._base.execute(query).fetchone()[0])

    def _set(self, column: str, value: int) -> None:
        with self._transaction():
            self._base.execute(f"UPDATE job SET {column} = ?", (value,))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with _explained(self._file):
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._base.execute("ROLLBACK")
                raise
            self._base.execute("COMMIT")


@contextmanager
def reading(file: Path) -> Iterator[Index]:
    """The index of a job that some process may be working on."""
    with closing(Index(file)) as index:
        yield index


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise Unavailable(
            f"the job's state in {file} cannot be used ({error}): free its disk, or delete the folder to begin anew"
        ) from error
