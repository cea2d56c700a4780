"""`outrider trace` prints figures and a picture of a file, or one line of error."""

import json
from pathlib import Path

import pytest
from PIL import Image

from actors.tracing.trace_reader import (
    intersection,
    middle_window,
    read_trace,
    save_trace,
    trace_stats,
    union,
)
from runtime.core.errors import InvalidRequest
from runtime.telemetry.tracing import BOOKKEEPING, COMMIT, COMPUTE, GROWTH, PREFILL, WAIT, Recording
from tests.runtime.telemetry.test_tracing import MS, synthetic
from tests.support.command import assert_one_error_line, outrider


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 steps of 20 ms after a prefill of 10 ms."""
    file = tmp_path_factory.mktemp("trace") / "run.json"
    save_trace(file, synthetic(70, ("draft-0", "draft-1")))
    return file


def test_shares_and_overlap_are_those_of_the_run(run: Path) -> None:
    found = read_trace(run)
    assert found.run == pytest.approx((0.0, 1.41))
    seen = trace_stats(found, (0.010, 1.410))
    expected = {PREFILL: 0.0, WAIT: 0.1, BOOKKEEPING: 0.1, COMPUTE: 0.8, "other": 0.0}
    assert seen.target == pytest.approx(expected, abs=1e-6)
    assert seen.drafters == pytest.approx({"draft-0": 0.4, "draft-1": 0.4}, abs=1e-6)
    assert seen.overlap == pytest.approx(9 / 20, abs=1e-6)  # from 4 to 13 ms of each pass of 16
    assert (seen.delays[GROWTH].count, seen.delays[COMMIT].count) == (140, 140)
    assert seen.delays[GROWTH].median == pytest.approx(1 * MS, abs=1e-6)
    assert seen.delays[COMMIT].median == pytest.approx(3 * MS, abs=1e-6)


def test_a_window_cuts_what_reaches_over_its_edges(run: Path) -> None:
    seen = trace_stats(
        read_trace(run), (0.010, 0.020)
    )  # 2 ms wait, 8 ms of the first pass, of which 4 beside draft-0's step
    assert seen.target == pytest.approx(
        {PREFILL: 0.0, WAIT: 0.2, BOOKKEEPING: 0.0, COMPUTE: 0.8, "other": 0.0}, abs=1e-6
    )
    assert seen.drafters == pytest.approx({"draft-0": 0.4, "draft-1": 0.3}, abs=1e-6)
    assert seen.overlap == pytest.approx(0.4, abs=1e-6)


def test_intervals() -> None:
    assert union([(3.0, 4.0), (0.0, 1.0), (1.0, 2.0), (0.5, 0.75)]) == [(0.0, 2.0), (3.0, 4.0)]
    assert intersection([(0.0, 2.0), (3.0, 5.0)], [(1.0, 4.0), (4.5, 6.0)]) == [
        (1.0, 2.0),
        (3.0, 4.0),
        (4.5, 5.0),
    ]


def test_the_excerpt_is_around_the_middle_step(run: Path) -> None:
    begin, end = middle_window(read_trace(run))
    assert end - begin == pytest.approx(0.5)
    assert begin < 0.712 < end


def test_the_command_prints_figures_and_draws(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "picture"
    assert outrider(monkeypatch, "trace", run, "--png", out) == 0
    shown = capsys.readouterr()
    assert "compute 79%" in shown.out
    assert "140, median 3.00 ms" in shown.out
    assert shown.err == ""
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert image.width > 1000
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or ()}
    assert (0x2B, 0x6C, 0xB0) in colours  # a forward pass
    assert (0xF6, 0xC4, 0x45) in colours  # a wait


def test_what_is_asked_for_beyond_the_trace_is_cut_off(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outrider(monkeypatch, "trace", run, "--from", "-5", "--to", "inf") == 0
    assert "0.000 s to 1.410 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    "drafters",
    [(), ("a $b$ drafter [bold] with a name that is much too long",)],
    ids=["alone", "odd name"],
)
def test_other_casts_are_drawn_too(
    drafters: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_trace(tmp_path / "run.json", synthetic(3, drafters))
    assert (
        outrider(
            monkeypatch,
            "trace",
            tmp_path / "run.json",
            "--png",
            tmp_path / "run.png",
            "--from",
            0,
            "--to",
            0.02,
        )
        == 0
    )
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_clocks_that_disagree_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drafter, target = synthetic(5)
    save_trace(
        tmp_path / "run.json",
        [Recording(drafter.process, drafter.offset + 2 * MS, drafter.events, cut=True), target],
    )
    assert outrider(monkeypatch, "trace", tmp_path / "run.json") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "clocks disagree: the minimum is -1.00 ms" in shown
    assert "the recording was full" in shown


EMPTY = {"traceEvents": [], "otherData": {"format": "outrider", "cut": False, "unanswered": {}}}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"{", "invalid JSON"),
        (b"\xff\xfe", "invalid JSON"),
        (b"[]", "is not a trace of outrider"),
        (b'{"traceEvents": []}', "otherData"),
        (json.dumps(EMPTY | {"otherData": {"format": "other"}}).encode(), "otherData.format"),
        (json.dumps(EMPTY | {"traceEvents": [{"ph": "X"}]}).encode(), "traceEvents.0"),
        (json.dumps(EMPTY | {"traceEvents": [{"ph": "?"}]}).encode(), "traceEvents.0"),
        (
            b'{"traceEvents": [{"ph": "i", "name": "n", "pid": 1, "tid": 2, "ts": NaN}], '
            b'"otherData": {}}',
            "traceEvents.0",
        ),
        (json.dumps(EMPTY).encode(), "empty trace"),
    ],
)
def test_a_file_that_is_no_trace_of_ours(
    content: bytes,
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(content)
    assert outrider(monkeypatch, "trace", file) == 2
    assert_one_error_line(named, capsys)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--from", "0.5", "--to", "0.5"], "0.5 s"),
        (["--from", "1", "--to", "0.5"], "0.5 s"),
        (["--from", "nan"], "nan"),
        (["--from", "7", "--to", "8"], "1.410 s"),
        (["--from", "soon"], "--from"),
        (["--png", "/nowhere/picture.png"], "/nowhere/picture.png"),
    ],
)
def test_arguments_that_cannot_be(
    arguments: list[str],
    named: str,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert outrider(monkeypatch, "trace", run, *arguments) == 2
    assert_one_error_line(named, capsys)


@pytest.mark.parametrize("file", ["/nowhere/run.json", "."])
def test_a_file_that_cannot_be_read(
    file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outrider(monkeypatch, "trace", file) == 2
    assert_one_error_line(f"cannot read {file}", capsys)


def test_a_trace_that_cannot_be_written() -> None:
    with pytest.raises(InvalidRequest, match=r"/nowhere/run\.json"):
        save_trace(Path("/nowhere/run.json"), [])
