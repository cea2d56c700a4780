"""Calibration survives a restart; a broken file costs only a cold start."""

import logging
from pathlib import Path

import pytest

from actors.calibration_store import load_calibrations, save_calibrations
from runtime.model_paths import calibration_file
from runtime.scoring.calibration import Calibrations


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
