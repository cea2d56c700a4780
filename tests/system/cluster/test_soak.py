"""`make soak` in small: a served fleet under mixed traffic and faults."""

from pathlib import Path

import pytest

from bench.soak.run import SoakOptions, run_in_cluster
from tests.support.pair import save_model

pytestmark = pytest.mark.cluster


def test_a_soak_of_seconds_counts_samples_and_comes_to_rest(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    model = str(save_model(tmp_path / "tiny", context=512))
    options = SoakOptions(
        model, model, seconds=14.0, clients=3, tokens=24, seed=2, fault_s=5.0, sample_s=0.5
    )
    report = run_in_cluster(options, tmp_path, lambda _: None)
    assert report.passed, (report.lines, report.left)
    assert not report.judged
    assert report.faults
    assert {"batch", "chat", "grammar", "logprobs"} <= report.answers.keys()
    sampled = {track.process for track in report.tracks if len(track.times) > 5}
    assert {"gateway-0", "controller", "target-0", "chaos-0", "raylet"} <= sampled
    judged = {track.process for track in report.tracks if track.judged}
    assert judged == {"gateway-0", "controller", "target-0", "chaos-0"}
    target = next(track for track in report.tracks if track.process == "target-0")
    assert min(target.values["memory"]) > 20, "MiB"
