"""Property tests have the same examples in every run, or those of a seed that is given."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PROBE = """
from hypothesis import given, settings, strategies
seen = []

@settings(max_examples=20)
@given(strategies.integers())
def test_probe(value):
    seen.append(value)

def test_show():
    with open({out!r}, "w") as file:
        file.write(repr(seen))
"""


def examples(folder: Path, *options: str) -> str:
    """Runs a property test in the project's settings; returns its examples."""
    probe, out = folder / "test_probe.py", folder / "seen"
    probe.write_text(PROBE.format(out=str(out)))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "tests.conftest", "--rootdir", str(folder), *options, str(probe)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return out.read_text()


@pytest.mark.slow
def test_examples_change_with_the_seed_alone(tmp_path: Path) -> None:
    plain = examples(tmp_path)
    assert len(plain) > 2
    assert examples(tmp_path) == plain
    seeded = examples(tmp_path, "--hypothesis-seed=7")
    assert seeded != plain
    assert examples(tmp_path, "--hypothesis-seed=7") == seeded
    assert examples(tmp_path, "--hypothesis-seed=8") not in (plain, seeded)
