"""Calibration survives a restart; a broken file costs only a cold start."""

import json
import logging
from pathlib import Path

import pytest

from actors.calibration_store import (
    load_calibrations,
    load_target_state,
    save_calibrations,
    save_target_state,
    target_state_file,
)
from runtime.config import TargetConfig
from runtime.model_paths import calibration_file
from runtime.schedulers.living import Living
from runtime.schedulers.plain import Plain
from runtime.scoring.calibration import Calibrations
from runtime.scoring.gate_account import PLAIN


def learned() -> Calibrations:
    known = Calibrations()
    for _ in range(50):
        known.bucket(0.0).table("draft-0").observe(0, -1.0, True)
    return known


def test_what_is_remembered_is_recalled(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "known.json"
    save_calibrations(file, learned())
    assert load_calibrations(file).to_dict() == learned().to_dict()
    save_calibrations(file, Calibrations())
    assert load_calibrations(file).to_dict() == {}
    assert [found.name for found in file.parent.iterdir()] == ["known.json"]


def test_without_a_file_it_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_calibrations(tmp_path / "none.json").to_dict() == {}
    assert caplog.text == ""


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"0.0": 3}', b'{"0.0": {"promise": 1, "tables": {"d": 5}}}', b"\xff\xfe"],
)
def test_a_file_that_is_not_ours_is_ignored_and_said(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "known.json"
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert load_calibrations(file).to_dict() == {}
    assert "starting afresh" in caplog.text


def test_a_folder_that_cannot_be_written_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        save_calibrations(tmp_path / "file" / "known.json", learned())
    assert "cannot be saved" in caplog.text


def test_pairs_have_files_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    files = {
        calibration_file("a", "target"),
        calibration_file("b", "target"),
        calibration_file("a", "drafter", "model x"),
        calibration_file("a", "drafter", "model y"),
    }
    assert len(files) == 4
    assert all(file.is_relative_to(tmp_path / "outrider") for file in files)
    assert calibration_file(str(tmp_path), "target") == calibration_file(f"{tmp_path}/.", "target")


TIMES = {1: 0.02, 4: 0.025}


def slow_drafter(steps: int = 200) -> Living:
    """A schedule that has found out that its drafter does not pay."""
    living = Living(TIMES)
    living.gate.use(["small"])
    for _ in range(steps):
        slow = 1.0 if living.gate.way == PLAIN else 1.5
        living.gate.observe(("all",), 1, 1, 1, slow * TIMES[1])
    living.update_pass_times(4, 0.04)
    assert living.gate.account.home == PLAIN
    return living


def test_a_target_goes_on_with_what_it_has_learned(tmp_path: Path) -> None:
    file, old, new = tmp_path / "known.json", slow_drafter(), Living({1: 0.04, 4: 0.05})
    save_target_state(file, learned(), [Plain(), old])
    assert load_target_state(file, new).to_dict() == learned().to_dict()
    assert new.seen == pytest.approx(2 * old.seen)  # as slow as then, relative to the start
    assert new.rate == pytest.approx(old.rate / 2)
    new.gate.use(["small"])
    assert new.gate.way == PLAIN  # from the first step on
    assert new.gate.speedup == pytest.approx(old.gate.speedup)
    assert new.gate.account.budget == pytest.approx(old.gate.account.budget)
    new.gate.use(["large"])
    assert new.gate.way == "all"  # of another drafter nothing is known
    assert load_target_state(file, Plain()).to_dict() == learned().to_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"gate": 3},
        {"gate": {"small": {"0": {"home": "none"}}}},
        {"gate": {"small": {"x": {}}}},
        {"slowdown": {"1": 1.0}},
        {"slowdown": {"1": 1.0, "4": float("nan")}},
        {"tokens": -1.0},
        {"seconds": 0.0},
    ],
    ids=str,
)
def test_a_damaged_state_of_a_target_is_ignored_and_said(
    tmp_path: Path, change: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    file, new = tmp_path / "known.json", Living(TIMES)
    living = {**slow_drafter().to_dict(), **change}
    file.write_text(json.dumps({"calibrations": learned().to_dict(), "living": living}))
    with caplog.at_level(logging.WARNING):
        found = load_target_state(file, new)
    assert found.to_dict() == {}
    assert "starting afresh" in caplog.text
    new.gate.use(["small"])
    assert new.gate.way == "all"


def test_precisions_and_devices_have_files_of_their_own() -> None:
    files = {
        target_state_file(TargetConfig(model=model, dtype=dtype))
        for model in ("a", "b")
        for dtype in ("float32", "bfloat16")
    }
    assert len(files) == 4
