"""Parts of a job that hold for all its lives: names, seeds, sizes, leases, folders, errors."""

import json
import math
from pathlib import Path
from typing import Any

import fsspec
import pytest

from actors.jobs import folders, items
from actors.jobs.aimd import INITIAL_SIZE, MAX_PAUSE_S, MIN_PAUSE_S, AimdWindow
from actors.jobs.items import Answer, Item
from actors.jobs.job import absolute_url
from actors.jobs.lease import LEASE_S, Lease
from actors.jobs.outputs import resolve_output
from runtime.core import limits
from runtime.core.errors import InvalidRequest, Unavailable
from tests.support.jobs_harness import line


def test_seeds_and_keys_are_the_same_in_every_version() -> None:
    """A job that another version resumes asks for the same answers under the same keys."""
    assert items.item_seed("job-1", "naïve") == 158_419_013_274_810
    assert items.item_key("job-1", "naïve") == "9014cd030cba4dc510cc5844"
    assert items.line_digest(b"{}").hex() == "44136fa355b3678a1146ad16f7e8649e"


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"usage": {"completion_tokens": 7}}, 7),
        ({"usage": {"completion_tokens": "7"}}, 0),
        ({"usage": {}}, 0),
        ({"usage": [7]}, 0),
        ({}, 0),
    ],
)
def test_tokens_are_those_that_the_server_counts(body: dict[str, Any], tokens: int) -> None:
    assert Answer(200, body).tokens == tokens


def test_a_name_is_printable_and_short_and_its_error_says_so() -> None:
    longest = "a" * limits.NAME_LENGTH
    found = items.parse_item(1, line(longest).encode(), "job-1")
    assert isinstance(found, Item)
    assert found.custom_id == longest
    out = "give a printable string of 1 to 256 characters"
    for given, said in (
        ("{}", "line 5 has no custom_id"),
        ('{"custom_id": null}', "line 5 has no custom_id"),
        ('{"custom_id": [1]}', "line 5 has custom_id [1]"),
        ('{"custom_id": ""}', 'line 5 has custom_id ""'),
    ):
        with pytest.raises(InvalidRequest) as refused:
            items.parse_custom_id(5, given.encode())
        assert (str(refused.value), refused.value.param) == (f"{said}: {out}", "custom_id")
    with pytest.raises(InvalidRequest, match="line 5: the body is invalid JSON") as refused:
        items.parse_custom_id(5, b"{")
    assert refused.value.param == "line"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "GET"}, 'method "GET" is not allowed: give POST'),
        (
            {"url": "/v1/x"},
            'url "/v1/x" is not allowed: give /v1/completions or /v1/chat/completions',
        ),
        ({"b": 1, "a": 1}, "unknown field 'a': an item has custom_id, method, url and body"),
        ({"body": []}, "body is missing or not an object: give the body of the request"),
        ({"body": {"stream": True}}, "stream is not supported in a batch: omit it"),
    ],
)
def test_what_is_wrong_with_an_item_is_its_answer_with_the_way_out(
    changes: dict[str, Any], message: str
) -> None:
    found = items.parse_item(1, json.dumps(json.loads(line("a")) | changes).encode(), "job-1")
    assert not isinstance(found, Item)
    assert (found.line, found.custom_id) == (1, "a")
    assert str(found.error) == message
    assert isinstance(items.parse_item(1, line("a", stream=False).encode(), "job-1"), Item), (
        "asks for nothing"
    )


def test_an_output_line_without_a_request_id_is_read() -> None:
    raw = b'{"custom_id": "a", "response": {"status_code": 200, "body": {}}}'
    assert items.parse_output_line(raw) == ("a", Answer(200, {}, ""))
    with pytest.raises(InvalidRequest, match=r"invalid output line b'\?\?'") as refused:
        items.parse_output_line(b"??")
    assert refused.value.param == "o"


def test_the_window_grows_by_one_item_in_a_round_of_answers() -> None:
    window = AimdWindow(64)
    assert window.free(0) == INITIAL_SIZE
    window.on_answer()
    assert window.size == INITIAL_SIZE + 1 / INITIAL_SIZE
    for count in range(2, 60):
        window.on_answer()  # its square grows by two, and a little more
        assert 0 < window.size - math.sqrt(INITIAL_SIZE**2 + 2 * count) < 0.2
        assert window.free(3) == int(window.size) - 3
    grown = window.size
    window.on_refusal(30)
    assert window.size == grown
    window.on_refusal(5)
    assert (window.size, window.free(3), window.free(9)) == (5, 2, 0)
    assert AimdWindow(2).free(0) == 2


def test_pauses_double_with_each_refusal_in_a_row_up_to_the_longest() -> None:
    window, pauses = AimdWindow(4), []
    for _ in range(9):
        window.on_refusal(0)
        pauses.append(window.pause)
    assert pauses == [min(MAX_PAUSE_S, MIN_PAUSE_S * 2**n) for n in range(9)]
    assert window.size == 1
    window.on_answer()
    window.on_refusal(0)
    assert window.pause == MIN_PAUSE_S


def test_a_lease_is_renewed_in_its_second_half_and_expires_at_its_end() -> None:
    fs, time = fsspec.filesystem("memory"), 100.0
    first = Lease(fs, "/leases/parts", lambda: time, "host-1")
    other = Lease(fs, "/leases/parts", lambda: time, "host-2")

    def until() -> float:
        found = json.loads(fs.cat_file("/leases/parts/owner.json"))
        assert found["host"] == "host-1"
        return float(found["until"])

    first.hold()
    assert until() == 100.0 + LEASE_S
    time = 99.9 + LEASE_S / 2
    first.hold()
    assert until() == 100.0 + LEASE_S
    time = 100.0 + LEASE_S / 2
    first.hold()
    assert until() == 100.0 + 1.5 * LEASE_S
    time = 99.9 + 1.5 * LEASE_S
    with pytest.raises(Unavailable, match=r"host host-1 works on this job: .* or wait 30 s after"):
        other.hold()
    other.release()  # not its own
    assert until() == 100.0 + 1.5 * LEASE_S
    time = 100.0 + 1.5 * LEASE_S
    other.hold()
    other.release()
    assert not fs.exists("/leases/parts/owner.json")
    other.release()  # again, to no effect


def test_the_state_is_next_to_a_file_and_in_the_users_folder_for_a_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    out = tmp_path / "out.jsonl"
    assert folders.state_folder(str(out), out) == tmp_path / "out.jsonl.job"
    far = folders.state_folder("s3://bucket/out.jsonl", None)
    assert far == tmp_path / "outrider" / "jobs" / far.name
    assert far == folders.state_folder("s3://bucket/out.jsonl", None)
    assert far != folders.state_folder("s3://bucket/other.jsonl", None)
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folders.jobs_folder() == tmp_path / ".local" / "share" / "outrider" / "jobs"


def test_jobs_are_found_wherever_their_folders_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    near, far = tmp_path / "out.jsonl.job", folders.state_folder("s3://bucket/out", None)
    for folder in (near, far):
        folder.mkdir(parents=True)
        (folder / folders.INDEX).touch()
        folders.register_job(folder)
        folders.register_job(folder)  # in each life of the job
    found = sorted(file.resolve() for file in folders.list_index_files())
    assert found == sorted((folder / folders.INDEX).resolve() for folder in (near, far))


def test_a_lock_names_its_process_and_leaves_a_folder_as_it_was(tmp_path: Path) -> None:
    new, old = tmp_path / "made" / "new", tmp_path / "old"
    old.mkdir()
    (old / "notes").touch()
    for folder in (new, old):
        with folders.lock_job(folder):
            assert folders.is_locked(folder)
            with pytest.raises(Unavailable, match=r"process \d+ works on the job in"):  # noqa: SIM117
                with folders.lock_job(folder):
                    pytest.fail("the second was let in")
        assert not folders.is_locked(folder)
    assert not new.exists()
    assert [file.name for file in old.iterdir()] == ["notes"]
    with folders.lock_job(new):
        (new / folders.INDEX).touch()
    assert (new / folders.INDEX).exists()
    folders.delete_index(new)
    assert [file.name for file in new.iterdir()] in ([folders.LOCK], [])


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nosuch://bucket/out", r"cannot write nosuch://bucket/out \(.*\): give a path, or a URL"),
        ("none/out.jsonl", r"folder .*/none does not exist: make it, or give another -o"),
        (".", r"is not a regular file: give another -o"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_by_its_name(
    url: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        resolve_output(url if "://" in url else str(tmp_path / url))
    assert refused.value.param == "o"


def test_links_to_one_file_are_one_output_and_urls_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").touch()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    found = resolve_output(str(tmp_path / "link"))
    assert found.file == (tmp_path / "real").resolve()
    assert found.lease is None
    far = resolve_output("memory://bucket/out")
    assert far.file is None
    assert far.lease is not None
    monkeypatch.chdir(tmp_path)
    assert absolute_url("in.jsonl") == str(tmp_path / "in.jsonl")
    for url in ("s3://bucket/in.jsonl", "zip::s3://a"):
        assert absolute_url(url) == url
