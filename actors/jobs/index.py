"""What a job has done so far, in SQLite: one row for the job, one for each item. What is committed survives the loss of power."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from actors.jobs.items import Answer
from actors.openai.errors import sanitize
from runtime.core.errors import InvalidRequest, Unavailable

SQLITE_TIMEOUT_S = 30.0  # seconds for another process, which reads or cancels, to be done
MIN_ERROR_STATUS = 400  # an HTTP status from here on is an error
PAGE_SIZE = 1000  # items that are read at one time
SCHEMA_VERSION = 1  # of the tables
SCHEMA = f"""
PRAGMA user_version = {SCHEMA_VERSION};
CREATE TABLE job (
  id TEXT NOT NULL, source TEXT NOT NULL, output TEXT NOT NULL, fingerprint TEXT NOT NULL, created REAL NOT NULL,
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
    """What a job is. `fingerprint` is that of the source's bytes; `created` in seconds since 1970."""

    id: str
    source: str
    output: str
    fingerprint: str
    created: float


@dataclass(frozen=True, slots=True)
class ItemResult:
    """An item that has its answer."""

    custom_id: str
    status: int
    tokens: int


@dataclass(frozen=True, slots=True)
class OutputMark:
    """How much of an output is known to be right.

    position  the bytes of a file; the number of parts of an object
    digest    SHA-256 of these bytes; "" for parts
    """

    position: int = 0
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Totals:
    """`failed` counts the answers that are errors, among those that are `done`."""

    items: int
    done: int
    failed: int
    tokens: int

    def plus(self, answers: Sequence[Answer]) -> "Totals":
        failed = sum(answer.status >= MIN_ERROR_STATUS for answer in answers)
        return Totals(
            self.items,
            self.done + len(answers),
            self.failed + failed,
            self.tokens + sum(answer.tokens for answer in answers),
        )


class JobIndex:
    """All methods may be called from any thread, by one at a time. Raises Unavailable where SQLite cannot use the folder.

    Methods that write are done when they return: the loss of power does not undo them.
    """

    def __init__(self, file: Path) -> None:
        with _sqlite_errors(file):
            self._base = sqlite3.connect(
                file, timeout=SQLITE_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            self._base.execute("PRAGMA journal_mode = WAL")
            self._base.execute(
                "PRAGMA synchronous = FULL"
            )  # WAL's default would lose the last commits with the power
        self._file = file

    def close(self) -> None:
        self._base.close()

    def record(self) -> JobRecord | None:
        """None: no job was begun here. Raises Unavailable where another version of Outrider has begun it."""
        with _sqlite_errors(self._file):
            if not self._base.execute("SELECT 1 FROM sqlite_master WHERE name = 'job'").fetchall():
                return None
            if self._one("PRAGMA user_version") != SCHEMA_VERSION:
                raise Unavailable(
                    f"another version of Outrider has begun the job in {self._file.parent}: end it with that one"
                )
            return JobRecord(
                *self._base.execute(
                    "SELECT id, source, output, fingerprint, created FROM job"
                ).fetchone()
            )

    @contextmanager
    def creating(self) -> Iterator[None]:
        """What `add` and `name` do inside is done together when the block ends, or not at all."""
        with self._transaction():
            for statement in SCHEMA.split(";"):
                self._base.execute(statement)
            yield

    def add(self, line: int, name: str, digest: bytes) -> None:
        """Raises InvalidRequest for a custom_id that stands on two lines."""
        row = (line, name, digest)
        if not self._base.execute(
            "INSERT OR IGNORE INTO items (line, custom_id, digest) VALUES (?, ?, ?)", row
        ).rowcount:
            first = self._base.execute(
                "SELECT line FROM items WHERE custom_id = ?", (name,)
            ).fetchone()[0]
            raise InvalidRequest(
                f"line {line} has the custom_id of line {first}, {sanitize(name)!r}: give each its own",
                "custom_id",
            )

    def name(self, record: JobRecord) -> JobRecord:
        """Raises InvalidRequest where no item was added."""
        if not self.totals().items:
            raise InvalidRequest(f"{record.source} has no items: give at least one line", "file")
        row = (record.id, record.source, record.output, record.fingerprint, record.created)
        self._base.execute(
            "INSERT INTO job (id, source, output, fingerprint, created) VALUES (?, ?, ?, ?, ?)", row
        )
        return record

    def mark(self) -> OutputMark:
        """How much of the output is known here to be right."""
        with _sqlite_errors(self._file):
            return OutputMark(*self._base.execute("SELECT position, digest FROM job").fetchone())

    def unanswered(self) -> Iterator[tuple[int, bytes]]:
        """Lines, rising, each with its digest. Answers may be kept meanwhile: the index is read a page at a time."""
        line = 0
        query = f"SELECT line, digest FROM items WHERE status IS NULL AND line > ? ORDER BY line LIMIT {PAGE_SIZE}"
        while True:
            with _sqlite_errors(self._file):
                rows = self._base.execute(query, (line,)).fetchall()
            yield from rows
            if len(rows) < PAGE_SIZE:
                return
            line = rows[-1][0]

    def save(self, kept: Sequence[ItemResult], mark: OutputMark) -> None:
        """These have their answers, and the output is right up to `mark`: both or neither.

        Raises InvalidRequest for a custom_id that no item has.
        """
        with self._transaction():
            known = self._base.executemany(
                "UPDATE items SET status = ?, tokens = ? WHERE custom_id = ?",
                [(one.status, one.tokens, one.custom_id) for one in kept],
            ).rowcount
            if known < len(kept):
                raise InvalidRequest(
                    "the output has answers to items that its job does not have: bring it back as the job left it",
                    "o",
                )
            self._base.execute(
                "UPDATE job SET position = ?, digest = ?", (mark.position, mark.digest)
            )

    def totals(self) -> Totals:
        with _sqlite_errors(self._file):
            counts = f"COUNT(*), COUNT(status), COALESCE(SUM(status >= {MIN_ERROR_STATUS}), 0), COALESCE(SUM(tokens), 0)"
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
    """The index of a job that some process may be working on."""
    with closing(JobIndex(file)) as index:
        yield index


@contextmanager
def _sqlite_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise Unavailable(
            f"the job's state in {file} cannot be used ({error}): free its disk, or delete the folder to begin anew"
        ) from error
