"""A small benchmark from end to end: ours on a cluster, transformers' in processes of their own."""

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from actors.fleet.ray_session import translate_ray_errors
from bench.core import compare
from bench.core import results as kept
from bench.core.machine import two_cores
from bench.core.methods import PLAIN
from bench.core.options import BenchOptions, Size
from bench.run import benchmark, differing_methods
from tests.support.pair import save_model

pytestmark = pytest.mark.cluster


def test_a_small_benchmark_from_end_to_end(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draft is the target itself: every guess is right."""
    monkeypatch.setattr("bench.run.CACHE", tmp_path / "cache")
    monkeypatch.setattr(
        "bench.core.outrider_runner.ray_cluster", lambda address, cpus: translate_ray_errors()
    )  # it is in a cluster already
    model = str(save_model(tmp_path / "tiny", context=512))
    texts = tmp_path / "texts.txt"
    texts.write_text("def f(x):\nimport os\nclass A:\nreturn None\n")
    options = BenchOptions(
        model,
        model,
        False,
        "float32",
        texts,
        Size(1, 1, 24, (0.0,), (2,)),
        1,
        True,
        tmp_path / "found",
        "tiny",
    )
    before = os.sched_getaffinity(0)
    found = benchmark(options, Console(file=io.StringIO()))
    assert os.sched_getaffinity(0) == before
    assert len(two_cores()) == 2
    assert found == kept.read_results(tmp_path / "found" / "tiny.json")
    assert {(one.method, one.batch) for one in found.runs if one.batch > 1} == {
        (name, 2) for name in ("plain", "living", "transformers greedy")
    }
    assert differing_methods(found) == []
    tree, living, plain = (
        compare.total_steps(found, name) for name in ("sync tree", "living", PLAIN.name)
    )
    assert tree is not None
    assert living is not None
    assert plain is not None
    assert tree.by_drafter["draft-0"] == tree.accepted > 0 == plain.drafted
    assert tree.rounds < plain.rounds == 24
    assert (
        sum(living.by_drafter.values()) == living.accepted
    )  # which may be 0: it need not wait for a draft as slow as its target
    assert {forecast.method for forecast in found.forecasts} == {"plain", "living", "sync tree"}
    page = (tmp_path / "found" / "tiny.md").read_text("utf-8")
    assert "tiny-trace.png" in page
    assert (tmp_path / "found" / "tiny-trace.png").read_bytes().startswith(b"\x89PNG")
