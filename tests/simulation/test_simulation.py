"""The simulation finds nothing in the product, finds what is planted, and repeats itself."""

import subprocess
import sys

import pytest

from tests.simulation.planted import PLANTED, changed
from tests.simulation.scenario import draw
from tests.simulation.search import command, shrink, simulate
from tests.support.paths import ROOT


def simulation(*words: str) -> str:
    """Run the command; return what it prints. Fails unless it succeeds."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulation", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_all_promises_are_kept() -> None:
    assert "200 seeds" in simulation("--seeds", "200", "--jobs", "1")


def test_planted_faults_are_found() -> None:
    assert "NOT FOUND" not in simulation("--plant", "quick", "--jobs", "1")


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_fits_the_source(name: str) -> None:
    assert callable(changed(name))


@pytest.mark.parametrize("seed", [3, 7, 34])  # 3 has a batch job
def test_a_seed_repeats_itself(seed: int) -> None:
    first, second = simulate(seed), simulate(seed)
    assert first.timeline == second.timeline
    assert first.turns > 100


def test_a_failing_seed_is_shrunk_to_a_command_that_replays_it() -> None:
    fault = "choice read from the wrong row"
    seed = next(seed for seed in range(20) if simulate(seed, plant=fault).failure)
    smallest = shrink(seed, fault)
    assert len(smallest.parts) < len(draw(seed).parts)
    words = command(smallest, fault)
    assert words.startswith(f"python -m tests.simulation --seed {seed} --without ")
    assert simulate(seed, smallest.left_out, fault).failure
    assert not simulate(seed, smallest.left_out).failure
