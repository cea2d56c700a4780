"""Decides which files are mutated, which of their mutants are run, and what the results say."""

import difflib
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Literal

Verdict = Literal["killed", "survived"]

GOAL = 0.9  # of the mutants that are not equal, killed
STRING = re.compile(r"""(["'])(?:\\.|(?!\1).)*\1""")


@dataclass(frozen=True, slots=True)
class Module:
    """Files that one narrow choice of tests holds to their promises."""

    name: str
    files: tuple[str, ...]
    tests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Mutant:
    """A change of one place: the lines without it and with it, each in one string."""

    name: str
    file: str
    line: str
    mutant: str


@dataclass(frozen=True, slots=True)
class Equal:
    """Mutants of a line that no test can tell from it, and why."""

    file: str
    line: str
    mutants: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class FileResult:
    """The figures of one file. `made` counts all its mutants, `run` those that were tried."""

    file: str
    made: int
    run: int
    killed: int
    equal: int
    survivors: tuple[Mutant, ...]

    @property
    def share(self) -> float:
        """Return the share of the mutants tried that were killed; 1 if none was tried."""
        return self.killed / self.run if self.run else 1.0


def read_modules(text: str) -> list[Module]:
    """Read modules.toml."""
    return [
        Module(name, tuple(table["files"]), tuple(table["tests"]))
        for name, table in tomllib.loads(text).items()
    ]


def read_equal(text: str) -> list[Equal]:
    """Read equal.toml."""
    return [
        Equal(entry["file"], entry["line"], tuple(entry["mutants"]), entry["reason"])
        for entry in tomllib.loads(text).get("equal", ())
    ]


def chosen(modules: Sequence[Module], patterns: Iterable[str]) -> list[tuple[str, Module]]:
    """Return the files whose path, or whose module's name, matches a pattern, in order."""
    wanted = list(patterns)
    return [
        (file, module)
        for module in modules
        for file in module.files
        if any(fnmatch(name, pattern) for name in (file, module.name) for pattern in wanted)
    ]


def compare(name: str, file: str, original: str, mutated: str) -> Mutant:
    """Return the mutant that turns one source text into the other."""
    lines = list(
        difflib.unified_diff(original.splitlines(), mutated.splitlines(), lineterm="", n=0)
    )[2:]
    sides = [" ".join(line[1:].strip() for line in lines if line[0] == sign) for sign in ("-", "+")]
    return Mutant(name, file, *sides)


def is_wording(mutant: Mutant) -> bool:
    """Return True if a mutant changes nothing but text that people read: it has spaces."""

    def wordless(line: str) -> str:
        return STRING.sub(lambda match: '" "' if " " in match[0] else match[0], line)

    return wordless(mutant.line) == wordless(mutant.mutant)


def is_equal(mutant: Mutant, equal: Iterable[Equal]) -> bool:
    """Return True if a mutant is listed as equal."""
    return any(
        (entry.file, entry.line) == (mutant.file, mutant.line) and mutant.mutant in entry.mutants
        for entry in equal
    )


def sample(mutants: Sequence[Mutant], most: int) -> list[Mutant]:
    """Return at most `most` mutants, evenly spread over the file; 0 means all."""
    if most == 0 or len(mutants) <= most:
        return list(mutants)
    return [mutants[i * len(mutants) // most] for i in range(most)]


def verdict(exit_code: int | None) -> Verdict:
    """Read the exit code of a mutant's tests: 0 passed, 5 and 33 no test reaches the line.

    Everything else is a kill: a failure, a crash, or tests that do not end in time.
    """
    return "survived" if exit_code in (0, 5, 33) else "killed"


def summary(results: Sequence[FileResult]) -> list[tuple[str, ...]]:
    """Return the rows of the table, the last one for all files together."""
    total = Counter[str]()
    rows = []
    for result in results:
        figures = {
            "made": result.made,
            "run": result.run,
            "killed": result.killed,
            "survived": len(result.survivors),
            "equal": result.equal,
        }
        total.update(figures)
        rows.append((result.file, *map(str, figures.values()), f"{result.share:.0%}"))
    share = total["killed"] / total["run"] if total["run"] else 1.0
    names = ("made", "run", "killed", "survived", "equal")
    return [*rows, ("all", *(str(total[name]) for name in names), f"{share:.0%}")]
