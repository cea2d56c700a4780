"""What `make mutants` runs and counts."""

from pathlib import Path

import pytest

from tests.mutation.mutants import (
    Equal,
    FileResult,
    Module,
    Mutant,
    chosen,
    compare,
    is_equal,
    is_wording,
    read_equal,
    read_modules,
    sample,
    summary,
    verdict,
)
from tests.support.paths import ROOT

HERE = Path(__file__).parent
MODULES = read_modules((HERE / "modules.toml").read_text())
EQUAL = read_equal((HERE / "equal.toml").read_text())
TREE = Module("tree", ("a/tree.py", "a/table.py"), ("tests",))
JOBS = Module("jobs", ("b/jobs/worker.py",), ("tests",))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_every_module_names_files_and_tests_that_are_there(module: Module) -> None:
    assert module.files
    assert module.tests
    for path in (*module.files, *module.tests):
        assert (ROOT / path).exists(), path


def test_an_equal_mutant_is_one_of_a_line_that_is_there() -> None:
    assert read_equal('[[equal]]\nfile = "a"\nline = "x"\nmutants = ["y"]\nreason = "r"\n') == [
        Equal("a", "x", ("y",), "r")
    ]
    for entry in EQUAL:
        source = " ".join((ROOT / entry.file).read_text().split())
        assert " ".join(entry.line.split()) in source, entry
        assert entry.reason, entry


@pytest.mark.parametrize(
    ("patterns", "files"),
    [
        (["a/table.py", "README.md"], ["a/table.py"]),
        (["jobs"], ["b/jobs/worker.py"]),
        (["b/*"], ["b/jobs/worker.py"]),
        (["j*s", "tr"], ["b/jobs/worker.py"]),
        (["*"], ["a/tree.py", "a/table.py", "b/jobs/worker.py"]),
        (["docs/tree.md"], []),
    ],
)
def test_files_are_chosen_by_pattern_or_module(patterns: list[str], files: list[str]) -> None:
    assert [file for file, _ in chosen([TREE, JOBS], patterns)] == files


def test_a_mutant_is_its_changed_lines() -> None:
    found = compare(
        "m", "f", "def f():\n    a = 1\n    return a", "def f():\n    a = 2\n    return a"
    )
    assert found == Mutant("m", "f", "a = 1", "a = 2")


@pytest.mark.parametrize(
    ("line", "mutant", "wording"),
    [
        ('raise E("no such file")', 'raise E("XXno such fileXX")', True),
        ('raise E("no such file", 1)', 'raise E("no such file", 2)', False),
        ('raise E("no such file")', "raise E(None)", False),
        ('end("length")', 'end("LENGTH")', False),
        ('f(" ", "code")', 'f("XX XX", "code")', True),
    ],
)
def test_only_text_for_people_is_wording(line: str, mutant: str, wording: bool) -> None:
    assert is_wording(Mutant("m", "f", line, mutant)) == wording


def test_equal_mutants_are_found_by_file_line_and_change() -> None:
    entry = Equal("f", "a = 1", ("a = 2",), "why")
    assert is_equal(Mutant("m", "f", "a = 1", "a = 2"), [entry])
    assert not is_equal(Mutant("m", "f", "a = 1", "a = None"), [entry])
    assert not is_equal(Mutant("m", "g", "a = 1", "a = 2"), [entry])


def test_a_sample_is_spread_over_the_file() -> None:
    mutants = [Mutant(str(i), "f", "", "") for i in range(10)]
    assert [m.name for m in sample(mutants, 4)] == ["0", "2", "5", "7"]
    assert sample(mutants, 0) == sample(mutants, 10) == mutants


@pytest.mark.parametrize(
    ("code", "said"), [(0, "survived"), (33, "survived"), (5, "survived"), (1, "killed")]
)
def test_what_no_test_reaches_has_survived(code: int, said: str) -> None:
    assert verdict(code) == said
    assert verdict(-24) == "killed"  # its tests did not end in time


def test_the_table_adds_up() -> None:
    survivor = Mutant("m", "a", "x", "y")
    results = [
        FileResult("a", made=12, run=10, killed=9, equal=2, survivors=(survivor,)),
        FileResult("b", made=0, run=0, killed=0, equal=0, survivors=()),
    ]
    assert summary(results) == [
        ("a", "12", "10", "9", "1", "2", "90%"),
        ("b", "0", "0", "0", "0", "0", "100%"),
        ("all", "12", "10", "9", "1", "2", "90%"),
    ]
