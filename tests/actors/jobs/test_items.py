"""What a line of a batch file may be, and what comes of one that is wrong."""

import json
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.jobs import items, source
from actors.jobs.items import Answer, InvalidItem, Item
from runtime.core import limits
from runtime.core.errors import InvalidRequest
from tests.support.jobs_harness import line


def test_an_item_keeps_its_own_seed_and_one_without_gets_one_of_its_own() -> None:
    own = items.parse_item(3, line("a", seed=7).encode(), "job-1")
    assert own == Item(
        3,
        "a",
        "/v1/completions",
        {"model": "m", "prompt": "a", "seed": 7},
        items.item_key("job-1", "a"),
    )
    given_ones = [
        items.parse_item(3, line(name, **more).encode(), job) for name, more, job in SEEDLESS
    ]
    seeds = [one.body["seed"] for one in given_ones if isinstance(one, Item)]
    assert seeds[0] == seeds[1]
    assert len({seeds[0], seeds[2], seeds[3]}) == 3
    assert all(0 <= seed < 2**48 for seed in seeds)


SEEDLESS: list[tuple[str, dict[str, None], str]] = [
    ("a", {}, "job-1"),
    ("a", {"seed": None}, "job-1"),
    ("b", {}, "job-1"),
    ("a", {}, "job-2"),
]


@pytest.mark.parametrize(
    ("changes", "param", "named"),
    [
        ({"method": "GET"}, "method", "GET"),
        ({"method": None}, "method", "null"),
        ({"url": "/v1/embeddings"}, "url", "/v1/embeddings"),
        ({"url": ["/v1/completions"]}, "url", "/v1/completions"),
        ({"body": "text"}, "body", "body"),
        ({"body": {"stream": True}}, "stream", "stream"),
        ({"boddy": {}}, "line", "boddy"),
    ],
)
def test_a_line_with_a_name_that_is_no_request_is_answered_so(
    changes: dict[str, object], param: str, named: str
) -> None:
    found = items.parse_item(9, json.dumps(json.loads(line("a")) | changes).encode(), "job-1")
    assert isinstance(found, InvalidItem)
    answer = items.error_answer(found.error)
    assert answer.status == 400
    error = answer.body["error"]
    assert (error["type"], error["code"], error["param"]) == (
        "invalid_request_error",
        "invalid_value",
        param,
    )
    assert named in error["message"]


@pytest.mark.parametrize("missing", ["method", "url", "body"])
def test_a_missing_field_is_named(missing: str) -> None:
    whole = json.loads(line("a"))
    del whole[missing]
    found = items.parse_item(1, json.dumps(whole).encode(), "job-1")
    assert isinstance(found, InvalidItem)
    assert f"{missing} is missing" in str(found.error)


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"[]",
        b'"text"',
        b'{"custom_id": 5}',
        b'{"custom_id": ""}',
        b'{"custom_id": "a\\nb"}',
        b'{"custom_id": "\\ud800"}',
        b'{"custom_id": "' + b"a" * (limits.NAME_LENGTH + 1) + b'"}',
        b'{"custom_id": "a", "custom_id": "b"}',
        b'{"custom_id": "a", "body": {"temperature": NaN}}',
        b'\xef\xbb\xbf{"custom_id": "a"}',
        b'{"custom_id": "\xff"}',
        b'{"custom_id": "a", "body": ' + b"[" * 5000,
        b"{}",
    ],
    ids=range(14),
)
def test_a_line_without_a_name_to_answer_to_is_refused_by_its_number(raw: bytes) -> None:
    for act in (lambda: items.parse_custom_id(17, raw), lambda: items.parse_item(17, raw, "job-1")):
        with pytest.raises(InvalidRequest, match="line 17") as caught:
            act()
        assert len(str(caught.value)) < 300


@given(st.binary(max_size=200))
def test_no_bytes_do_anything_else(raw: bytes) -> None:
    try:
        found = items.parse_custom_id(1, raw)
    except InvalidRequest:
        return
    assert found.isprintable()


def test_an_output_line_is_openais() -> None:
    written = items.output_line("job-1", "naïve", Answer(200, {"x": "\u2028é"}, "r-1"))
    assert written.isascii()
    assert written.endswith(b"\n")
    found = json.loads(written)
    assert found.pop("id").startswith("batch_req_")
    assert found == {
        "custom_id": "naïve",
        "response": {"status_code": 200, "request_id": "r-1", "body": {"x": "\u2028é"}},
        "error": None,
    }
    assert items.output_line("job-1", "other", Answer(200, {}))[:40] != written[:40]
    assert written.startswith(items.LINE_PREFIX)
    assert items.parse_output_line(written) == ("naïve", Answer(200, {"x": "\u2028é"}, "r-1"))


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"{}", b'{"custom_id": "a", "response": null}', b"\0\0", b"\xff"]
)
def test_a_line_that_is_no_output_line_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequest, match="restore the output"):
        items.parse_output_line(raw)


@given(
    st.lists(
        st.binary(max_size=30).map(lambda raw: raw.replace(b"\n", b" ").replace(b"\r", b" ")),
        max_size=20,
    ),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.integers(1, 64),
)
def test_lines_are_those_of_the_file_whatever_the_pieces(
    texts: list[bytes], end: bytes, ended: bool, piece: int
) -> None:
    content = end.join(texts) + (end if ended else b"")
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/lines.jsonl", content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "CHUNK_BYTES", piece)
        found = list(source.read_lines("memory://lines.jsonl"))
    assert found == [(number, text) for number, text in enumerate(texts, 1) if text.strip()]


@pytest.mark.parametrize("piece", [1, 2, 64])
def test_a_byte_order_mark_at_the_beginning_is_read_over(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Editors of Windows put one there."""
    monkeypatch.setattr(source, "CHUNK_BYTES", piece)
    file = tmp_path / "in.jsonl"
    first, second = line("a").encode(), b"\xef\xbb\xbf" + line("b").encode()
    file.write_bytes(b"\xef\xbb\xbf" + first + b"\r\n" + second + b"\n")
    assert list(source.read_lines(str(file))) == [(1, first), (2, second)]
    file.write_bytes(b"\xef\xbb\xbf\n" + first)
    assert list(source.read_lines(str(file))) == [(2, first)]


def test_a_line_that_is_too_long_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BODY_BYTES", 100)
    monkeypatch.setattr(source, "CHUNK_BYTES", 64)
    file = tmp_path / "in.jsonl"
    with file.open("wb") as opened:
        opened.write(b"{}\n")
        opened.truncate(1 << 30)
    with pytest.raises(InvalidRequest, match="line 2 is longer than 100 bytes"):
        list(source.read_lines(str(file)))


@pytest.mark.parametrize(
    "url", ["/nowhere/in.jsonl", "/", "nosuch://bucket/in.jsonl", "memory://nothing/in.jsonl"]
)
def test_a_file_that_cannot_be_read_is_named(url: str) -> None:
    for read in (source.fingerprint, lambda url: list(source.read_lines(url))):
        with pytest.raises(InvalidRequest, match=url):
            read(url)
