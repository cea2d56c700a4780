"""Stores the progress of a job in SQLite: one row for the job, and one for each item.

Committed rows survive a power loss.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from actors.jobs.items import Answer
from actors.openai.errors import sanitize
from runtime.core.errors import InvalidRequest, Unavailable

SQLITE_TIMEOUT_S = 30.0  # for a process that reads the index or cancels the job
MIN_ERROR_STATUS = 400
PAGE_SIZE = 1000  # items read at once
SCHEMA_VERSION = 1  # of the tables below
SCHEMA = f"""
PRAGMA user_version = {SCHEMA_VERSION};
CREATE TABLE job (
  id TEXT NOT NULL, source TEXT NOT NULL, output TEXT NOT NULL,
  fingerprint TEXT NOT NULL, created REAL NOT NULL,
  position INTEGER NOT NULL DEFAULT 0, digest TEXT NOT NULL DEFAULT '',
  finished INTEGER NOT NULL DEFAULT 0, cancelled INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE items (
  line INTEGER PRIMARY KEY, custom_id TEXT NOT NULL UNIQUE, digest BLOB NOT NULL,
  status INTEGER, tokens INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX unanswered ON items (line) WHERE status IS NULL;
"""


@dataclass(frozen=True, slots=True)
class JobRecord:
    """Identifies a job.

    fingerprint  SHA-256 of the source's bytes, as hex
    created      Unix time in seconds
    """

    id: str
    source: str
    output: str
    fingerprint: str
    created: float


@dataclass(frozen=True, slots=True)
class ItemResult:
    """The result of an item that has its answer."""

    custom_id: str
    status: int
    tokens: int


@dataclass(frozen=True, slots=True)
class OutputMark:
    """Tells how much of an output is known to be valid.

    position  bytes of a file, or number of parts of an object
    digest    SHA-256 of these bytes, as hex; "" for parts
    """

    position: int = 0
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts items. `done` includes `failed`, the answers that are errors."""

    items: int
    done: int
    failed: int
    tokens: int

    def plus(self, answers: Sequence[Answer]) -> "Totals":
        """Returns the totals after these answers."""
        failed = sum(answer.status >= MIN_ERROR_STATUS for answer in answers)
        return Totals(
            self.items,
            self.done + len(answers),
            self.failed + failed,
            self.tokens + sum(answer.tokens for answer in answers),
        )


class JobIndex:
    """Reads and writes the index file of a job.

    Methods may be called from any thread, one at a time. Those that write are durable when they
    return. All raise Unavailable if SQLite cannot use the file.
    """

    def __init__(self, file: Path) -> None:
        with _sqlite_errors(file):
            self._base = sqlite3.connect(
                file, timeout=SQLITE_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            self._base.execute("PRAGMA journal_mode = WAL")
            self._base.execute(
                "PRAGMA synchronous = FULL"
            )  # WAL's default may lose the last commits in a power loss
        self._file = file

    def close(self) -> None:
        self._base.close()

    def record(self) -> JobRecord | None:
        """Returns the job; None if no job was started here.

        Raises Unavailable if another version of Outrider started it.
        """
        with _sqlite_errors(self._file):
            if not self._base.execute("SELECT 1 FROM sqlite_master WHERE name = 'job'").fetchall():
                return None
            if self._one("PRAGMA user_version") != SCHEMA_VERSION:
                raise Unavailable(
                    f"another version of Outrider started the job in {self._file.parent}: finish "
                    "it with that version"
                )
            return JobRecord(
                *self._base.execute(
                    "SELECT id, source, output, fingerprint, created FROM job"
                ).fetchone()
            )

    @contextmanager
    def creating(self) -> Iterator[None]:
        """Makes all calls of `add` and `name` inside the block one transaction."""
        with self._transaction():
            for statement in SCHEMA.split(";"):
                self._base.execute(statement)
            yield

    def add(self, line: int, name: str, digest: bytes) -> None:
        """Adds an item. Raises InvalidRequest if another line has the same custom_id."""
        row = (line, name, digest)
        if not self._base.execute(
            "INSERT OR IGNORE INTO items (line, custom_id, digest) VALUES (?, ?, ?)", row
        ).rowcount:
            first = self._base.execute(
                "SELECT line FROM items WHERE custom_id = ?", (name,)
            ).fetchone()[0]
            raise InvalidRequest(
                f"line {line} has the custom_id of line {first}, {sanitize(name)!r}: "
                "make each unique",
                "custom_id",
            )

    def name(self, record: JobRecord) -> JobRecord:
        """Stores the record of the job. Raises InvalidRequest if no item was added."""
        if not self.totals().items:
            raise InvalidRequest(f"{record.source} has no items: give at least one line", "file")
        row = (record.id, record.source, record.output, record.fingerprint, record.created)
        self._base.execute(
            "INSERT INTO job (id, source, output, fingerprint, created) VALUES (?, ?, ?, ?, ?)", row
        )
        return record

    def mark(self) -> OutputMark:
        """Returns how much of the output is known to be valid."""
        with _sqlite_errors(self._file):
            return OutputMark(*self._base.execute("SELECT position, digest FROM job").fetchone())

    def unanswered(self) -> Iterator[tuple[int, bytes]]:
        """Yields the number and the digest of each line without an answer, in order.

        The index is read one page at a time, so answers may be saved meanwhile.
        """
        line = 0
        query = (
            "SELECT line, digest FROM items WHERE status IS NULL AND line > ? "
            f"ORDER BY line LIMIT {PAGE_SIZE}"
        )
        while True:
            with _sqlite_errors(self._file):
                rows = self._base.execute(query, (line,)).fetchall()
            yield from rows
            if len(rows) < PAGE_SIZE:
                return
            line = rows[-1][0]

    def save(self, kept: Sequence[ItemResult], mark: OutputMark) -> None:
        """Stores the results, and that the output is valid up to `mark`, in one transaction.

        Raises InvalidRequest for a custom_id that no item has.
        """
        with self._transaction():
            known = self._base.executemany(
                "UPDATE items SET status = ?, tokens = ? WHERE custom_id = ?",
                [(one.status, one.tokens, one.custom_id) for one in kept],
            ).rowcount
            if known < len(kept):
                raise InvalidRequest(
                    "the output has answers to unknown items: restore it as the job left it",
                    "o",
                )
            self._base.execute(
                "UPDATE job SET position = ?, digest = ?", (mark.position, mark.digest)
            )

    def totals(self) -> Totals:
        with _sqlite_errors(self._file):
            failed = f"COALESCE(SUM(status >= {MIN_ERROR_STATUS}), 0)"
            counts = f"COUNT(*), COUNT(status), {failed}, COALESCE(SUM(tokens), 0)"
            return Totals(*self._base.execute(f"SELECT {counts} FROM items").fetchone())

    def finish(self) -> None:
        self._set("finished", 1)

    def finished(self) -> bool:
        return bool(self._one("SELECT finished FROM job"))

    def cancel(self, wanted: bool = True) -> None:
        """Asks the process that works on the job to stop; the job can be resumed later."""
        self._set("cancelled", int(wanted))

    def cancelled(self) -> bool:
        return bool(self._one("SELECT cancelled FROM job"))

    def _one(self, query: str) -> int:
        with _sqlite_errors(self._file):
            return int(self._base.execute(query).fetchone()[0])

    def _set(self, column: str, value: int) -> None:
        with self._transaction():
            self._base.execute(f"UPDATE job SET {column} = ?", (value,))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with _sqlite_errors(self._file):
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._base.execute("ROLLBACK")
                raise
            self._base.execute("COMMIT")


@contextmanager
def open_index(file: Path) -> Iterator[JobIndex]:
    """Opens the index of a job that another process may be working on."""
    with closing(JobIndex(file)) as index:
        yield index


@contextmanager
def _sqlite_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise Unavailable(
            f"cannot use the job state in {file} ({error}): free disk space, or delete the folder "
            "to start over"
        ) from error
