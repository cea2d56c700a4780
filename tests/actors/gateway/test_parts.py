"""The gateway's parts that need no server: JSON, keys, streams, templates, figures, addresses."""

import asyncio
import hashlib
import hmac
import json
import logging
import os
import stat
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.gateway import api_keys
from actors.gateway.api_keys import ApiKeys, is_open, read_keys
from actors.gateway.server import build_server, check_exposure, listen
from actors.gateway.streams import merge_chunks
from actors.openai import chat_template
from actors.openai.chat_template import render
from actors.openai.errors import ApiError
from actors.openai.json_body import parse_json
from actors.openai.protocol import parse_body
from actors.openai.usage import merge_stats
from actors.rpc.endpoints import is_loopback
from runtime.config import GatewayConfig, TlsConfig
from runtime.core.errors import InvalidRequest, Unavailable
from runtime.core.messages import Chunk, Request, Round, Stats
from runtime.core.sampling_params import SamplingParams
from runtime.telemetry.metrics import SessionMetrics, speculative_decoding
from tests.support.gateway import tokenizer


def status_or(work: Callable[[], Any]) -> Any:
    """What it returns, or the status of what it refuses with."""
    try:
        return work()
    except ApiError as refused:
        return refused.status


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), values, max_size=6), st.booleans())
@settings(max_examples=40)
def test_what_is_json_is_read_as_json(value: dict[str, Any], ascii_only: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(
    st.text('[]{},:"\\ 01.eE-+\\nul', max_size=60)
    | st.binary(max_size=60).map(lambda data: data.decode("latin-1"))
)
@settings(max_examples=200)
def test_what_is_not_is_refused_and_never_more_than_json_allows(text: str) -> None:
    found = status_or(lambda: parse_json(text.encode()))
    assert found == 400 or found == json.loads(text)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.text('a:"\\', max_size=2), values), max_size=5))
def test_a_key_stands_once_in_an_object(pairs: list[tuple[str, Any]]) -> None:
    inner = ",".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in pairs)
    found = status_or(lambda: parse_json(f'{{"inside": [{{{inner}}}]}}'.encode()))
    assert found == ({"inside": [dict(pairs)]} if len(dict(pairs)) == len(pairs) else 400)


@pytest.mark.parametrize(
    "text", [",", "[", "]", "{", "}", ":", "9", '"', "\\", '\\"', '"\\', '"a:[', "\\\\,"]
)
def test_what_stands_in_a_string_counts_as_one_value(text: str) -> None:
    value = {"a": text * 300_000, text: ["x", {text: text}]}
    assert parse_json(json.dumps(value).encode()) == value


@settings(max_examples=40)
@given(
    st.dictionaries(st.text(), values, max_size=6),
    st.sampled_from(["/v1/completions", "/v1/chat/completions"]),
    st.booleans(),
)
def test_any_object_is_a_body_or_refused(value: dict[str, Any], url: str, strict: bool) -> None:
    assert status_or(lambda: parse_body(url, value, strict)) == 400 or "model" in value


def test_a_string_that_never_ends_takes_no_time() -> None:
    began = time.process_time()
    for text in (
        b'{"a":"' + b'\\"' * 1_000_000,
        b'"' * 2_000_001,
        b"[" * 2_000_000,
        b"1" * 2_000_000,
        b"," * 2_000_000,
    ):
        with pytest.raises(ApiError):
            parse_json(text)
    assert time.process_time() - began < 15


# Keys


def keys_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    file = folder / "keys"
    file.write_text(text)
    file.chmod(mode)
    return file


LONG = "0123456789abcdef"


def test_keys(tmp_path: Path) -> None:
    keys = ApiKeys(keys_file(tmp_path, f"# comment\n\nme:{LONG}\nyou:{LONG}1:a/b,c:d\n"))
    assert keys.find("") is keys.find(LONG[:-1]) is keys.find(LONG.upper()) is None
    me, you = keys.find(LONG), keys.find(f"{LONG}1")
    assert me is not None
    assert you is not None
    assert (me.name, me.models) == ("me", None)
    assert (you.name, you.models) == ("you", frozenset({"a/b", "c:d"}))


@pytest.mark.parametrize("given", [LONG, f"{LONG}1", f"{LONG}2", "unknown", ""])
def test_every_key_is_compared_in_constant_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    """Neither where a key differs nor which one it is shows in the time that it takes."""
    keys = ApiKeys(keys_file(tmp_path, f"a:{LONG}\nb:{LONG}1\nc:{LONG}2\n"))
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def recorded(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", recorded)
    keys.find(given)
    known = [hashlib.sha256(key.encode()).digest() for key in (LONG, f"{LONG}1", f"{LONG}2")]
    asked = hashlib.sha256(given.encode()).digest()
    assert [sorted(pair) for pair in compared] == [sorted((key, asked)) for key in known]


def test_a_key_that_is_taken_back_is_none_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = keys_file(tmp_path, f"me:{LONG}\nyou:{LONG}1\n")
    keys = ApiKeys(file)
    keys_file(tmp_path, f"you:{LONG}1\n")
    os.utime(file, ns=(1, 1))
    assert keys.find(LONG) is None
    assert keys.find(f"{LONG}1") is not None
    with caplog.at_level(logging.WARNING):
        file.unlink()
        assert keys.find(f"{LONG}1") is not None  # what cannot be read changes nothing
        keys_file(tmp_path, "nonsense")
        assert keys.find(f"{LONG}1") is not None
    unread, nonsense = [record.getMessage() for record in caplog.records]
    assert f"the API keys in {file} cannot be read (FileNotFoundError)" in unread
    assert "line 1 of the API keys is not NAME:KEY" in nonsense
    assert LONG not in caplog.text


@pytest.mark.parametrize(
    ("text", "mode", "why"),
    [
        (f"me:{LONG}", 0o644, "chmod 600"),
        (f"me:{LONG}", 0o620, "chmod 600"),
        ("", 0o600, "no API key"),
        ("me:short", 0o600, "line 1"),
        (f"ok:{LONG}\nme {LONG}", 0o600, "line 2"),
        (f"a b:{LONG}", 0o600, "line 1"),
        (f"me:{LONG} x", 0o600, "line 1"),
        (f"me:{LONG}\nme:{LONG}1", 0o600, "name stands twice"),
        (f"me:{LONG}\nyou:{LONG}", 0o600, "key stands twice"),
        ("me:\udcff" + LONG, 0o600, "UnicodeDecodeError"),
    ],
)
def test_a_file_of_keys_that_is_none(tmp_path: Path, text: str, mode: int, why: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(text.encode(errors="surrogateescape"))
    file.chmod(mode)
    with pytest.raises(InvalidRequest, match=why) as caught:
        read_keys(file)
    assert LONG not in str(caught.value)
    assert caught.value.param == "api_keys"


@pytest.mark.parametrize(
    ("mode", "owner", "reader", "it_is"),
    [
        (0o600, 1000, 1000, False),
        (0o640, 1000, 1000, True),
        (0o440, 0, 1000, False),  # a secret of Kubernetes: root's, and the reader is in its group
        (0o444, 0, 1000, True),
        (0o660, 0, 1000, True),
        (0o440, 0, 0, True),
        (0o440, 1001, 1000, True),
    ],
)
def test_when_a_file_of_keys_is_open(mode: int, owner: int, reader: int, it_is: bool) -> None:
    assert is_open(mode, owner, reader) == it_is


def test_a_secret_of_root_is_read_by_the_user_that_it_is_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, asked = keys_file(tmp_path, f"me:{LONG}\n", 0o440), list[tuple[int, int, int]]()

    def closed(mode: int, owner: int, reader: int) -> bool:
        asked.append((stat.S_IMODE(mode), owner, reader))
        return is_open(mode, 0, 1000)

    monkeypatch.setattr(api_keys, "is_open", closed)
    assert [key.name for key in read_keys(file)] == ["me"]
    assert asked == [(0o440, file.stat().st_uid, os.geteuid())]


def test_a_file_of_keys_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read") as caught:
        ApiKeys(tmp_path / "none")
    assert caught.value.param == "api_keys"


# Streams


def test_chunks_of_each_request_stay_in_order_for_a_reader_that_is_slow() -> None:
    class Counter:
        async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
            for token in range(20):
                yield Chunk((str(token),), (token,), ("",))
                await asyncio.sleep(0)

    async def main() -> None:
        requests = [Request(name, (1,), SamplingParams()) for name in "ab"]
        said: dict[int, list[int]] = {0: [], 1: []}
        async with aclosing(merge_chunks(Counter(), requests)) as chunks:
            async for index, chunk in chunks:
                said[index].extend(chunk.tokens)
                for _ in range(5):
                    await asyncio.sleep(0)
        assert said == {0: [*range(20)], 1: [*range(20)]}

    asyncio.run(main())


# Templates


MESSAGES = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "more than",
        ),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "template"),
        ("{{ ''.__class__.__mro__ }}", "template"),
        ("{{ messages[5].content }}", "template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for a in range(3000) %}{{ 'x' * 4000 }}{% endfor %}", "more than 8388608 characters"),
        ("{% nonsense %}", "template"),
        ("{{ 1 / 0 }}", "template"),
        ("{% for a in range(10000000000) %}{% endfor %}", "template"),
        (" " * (300 << 10), "characters"),
        ("{{ 9 ** 9 ** 9 ** 9 }}", "powers"),
    ],
)
def test_a_template_that_runs_wild_is_refused(
    template: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "RENDER_TIMEOUT_S", 0.1 if why == "more than" else 60.0)
    with pytest.raises(ApiError, match=why) as refused:
        render(tokenizer(template), MESSAGES)
    assert refused.value.status == 400


def test_the_way_out_of_a_template_leaves_no_trace() -> None:
    before = sys.gettrace()
    assert render(tokenizer(), MESSAGES) == "<user>x\n<assistant>"
    assert render(tokenizer("**{{ messages[0].content }}**"), MESSAGES) == "**x**"
    assert sys.gettrace() is before


# Figures


def test_figures_of_several_choices_are_their_sum() -> None:
    one = Stats(2, 5, 3, 8, 6, 2, 1, (1, 2), {"a": 2}, {"late": 1}, 3.0)
    two = Stats(2, 4, 2, 7, 5, 3, 2, (1, 0, 1), {"a": 1, "b": 2}, {}, 2.0)
    found = merge_stats([one, two])
    assert (found.completion_tokens, found.rounds, found.histogram, found.by_drafter) == (
        9,
        5,
        (2, 2, 1),
        {"a": 3, "b": 2},
    )
    assert (found.elapsed, found.ignored) == (3.0, {"late": 1})


def test_a_draft_is_a_round_in_which_something_was_speculated() -> None:
    tally = SessionMetrics()
    for number, (width, accepted) in enumerate([(0, 0), (3, 0), (2, 2), (0, 0)]):
        tally.add(
            Round(
                "s", number, width, accepted, hit=False, waited=0.0, computed=1.0, bookkeeping=0.0
            )
        )
    stats = tally.stats(2, 6, drafted=5, by_drafter={"a": 2}, ignored={}, prefill=0.0, elapsed=4.0)
    said = speculative_decoding(stats)
    assert (said["num_drafts"], said["num_draft_tokens"], said["num_accepted_tokens"]) == (2, 5, 2)
    assert said["acceptance_histogram"] == [1, 0, 1]
    assert said["mean_acceptance_length"] == 6 / 4


# Addresses


TLS = TlsConfig(ca=Path("ca"), cert=Path("cert"), key=Path("key"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_a_gateway_that_others_reach_is_closed(host: str, caplog: pytest.LogCaptureFixture) -> None:
    for config, lacking in (
        (GatewayConfig(host=host), "api_keys and tls"),
        (GatewayConfig(host=host, api_keys=Path("k")), "tls"),
        (GatewayConfig(host=host, tls=TLS), "api_keys"),
    ):
        with pytest.raises(InvalidRequest, match=f"has no {lacking}: give them"):
            check_exposure(config)
    check_exposure(GatewayConfig(host=host, api_keys=Path("k"), tls=TLS))
    with caplog.at_level(logging.WARNING):
        check_exposure(GatewayConfig(host=host, insecure=True))
    assert "without api_keys and tls" in caplog.text


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_a_gateway_that_nobody_else_reaches_may_be_open(host: str) -> None:
    assert is_loopback(host)
    check_exposure(GatewayConfig(host=host))


def test_an_address_or_certificate_that_cannot_be_had(tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(Unavailable, match="choose another port"):
        listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(Unavailable, match="choose another address"):
        listen("no.such.host.invalid", 0)

    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    (tmp_path / "bad.pem").write_text("nonsense")
    for file in (tmp_path / "none.pem", tmp_path / "bad.pem"):
        with pytest.raises(InvalidRequest, match="certificate or key"):
            build_server(app, GatewayConfig(tls=TlsConfig(ca=file, cert=file, key=file)))
