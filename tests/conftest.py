"""What all tests share."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, settings

import runtime

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadFileScheduling

# The models are tiny: a second thread only costs. This is set before anything loads torch, and
# Ray's workers inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# What is learned here must not warm the user's own runs, nor theirs ours.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="outrider-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

ROOT = Path(__file__).parents[1]

# The same examples in every run, or those of `--hypothesis-seed` (`make test-random`). No limit of
# time for running or drawing one: a slow machine is not a fault. A mutant is killed by the first
# example that fails: nobody reads the smallest one.
settings.register_profile(
    "outrider",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate] if "OUTRIDER_TEST_MUTANTS" in os.environ else Phase,
)
settings.register_profile(
    "seeded", settings.get_profile("outrider"), derandomize=False, database=None, print_blob=True
)
settings.load_profile("outrider")

# The packages have general names: another `runtime` on the path would be tested instead.
assert Path(str(runtime.__file__)).parent == ROOT / "runtime", (
    f"runtime is imported from {runtime.__file__}, not from {ROOT}"
)


def pytest_configure(config: pytest.Config) -> None:
    """Hypothesis itself ignores a seed where examples are the same in every run."""
    if config.getoption("--hypothesis-seed") is not None:
        settings.load_profile("seeded")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of larger models and prompts that may lie beside the checkout."""
    folder = ROOT.parent / "shared"
    if not (folder / "models").is_dir():
        pytest.skip(f"needs the models of {folder}")
    return folder


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: "Producer") -> "LoadFileScheduling":
    """Runs each file in one process of several (`make test`), and all files that start Ray in one.

    These share a Ray and wait more than they compute, so they start first.
    """
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return (
                "cluster"
                if nodeid.startswith("tests/system/cluster/")
                else super()._split_scope(nodeid)
            )

    config.option.loadscopereorder = False  # as they are collected: by name
    return ByFile(config, log)
