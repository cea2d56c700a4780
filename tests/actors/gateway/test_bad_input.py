"""Bad input and what it gets: a row of the table each. Nothing of it reaches a target, and nothing is repeated at length."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from actors.gateway.api_keys import Keys
from runtime.core import limits
from tests.support.gateway import CONTEXT, MODEL, Running, Scripted, never, serving, tokenizer
from tests.support.harness import HANG_S

KEY, OTHER = "a-key-for-all-models", "a-key-for-another-one"
MARK = "SECRET" * 40  # long enough to be seen where it is repeated
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"content-type": "application/json"}
BEARER = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"all:{KEY}\nsome:{OTHER}:another-model\n")
    file.chmod(0o600)
    return file


@pytest.fixture(scope="module")
def gateway(keys: Path) -> Iterator[Running]:
    with serving(Scripted(never), keys=Keys(keys)) as running:
        running.headers.update(BEARER)
        yield running


@pytest.fixture(scope="module")
def client(gateway: Running) -> Iterator[httpx.Client]:
    with gateway.http() as client:
        yield client


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "import os", **fields}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], **fields}


def deep(levels: int) -> bytes:
    return b'{"model":"toy","prompt":' + b"[" * levels + b"]" * levels + b"}"


def form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


def part(kind: str, **fields: Any) -> dict[str, Any]:
    return chat(
        messages=[
            {
                "role": "user",
                "content": [{"type": "text", "text": "what is this?"}, {"type": kind, **fields}],
            }
        ]
    )


WRONG_VALUES: list[tuple[str, dict[str, Any]]] = [
    *(
        ("max_tokens", completion(max_tokens=value))
        for value in (0, -1, 1e18, "5", True, 1.5, [1], {"a": 1})
    ),
    *(("max_completion_tokens", chat(max_completion_tokens=value)) for value in (0, -1, "5", True)),
    *(("n", completion(n=value)) for value in (0, 9, 10**9, "2", True, 1.5)),
    ("prompt", completion(prompt=["a"] * 9)),
    ("prompt", completion(prompt=[[1]] * 9)),
    ("prompt", completion(prompt="")),
    ("prompt", completion(prompt=[])),
    ("prompt", completion(prompt=[[]])),
    ("prompt", completion(prompt=5)),
    ("prompt", completion(prompt=[1, "a", []])),
    ("prompt", completion(prompt=[True])),
    ("prompt", completion(prompt=[-1])),
    ("prompt", completion(prompt=[len(tokenizer())])),
    ("prompt", completion(prompt=[2**63])),
    ("prompt", completion(prompt=[[1], [2**200]])),
    ("stop", completion(stop=["a"] * 5)),
    ("stop", completion(stop="a" * 65)),
    ("stop", completion(stop="")),
    ("stop", completion(stop=["a", ""])),
    ("stop", completion(stop=[1])),
    *(("temperature", completion(temperature=value)) for value in (-1, 101, 1e-5, "1", True)),
    *(("top_p", completion(top_p=value)) for value in (0, 1.1, -1)),
    *(("min_p", completion(min_p=value)) for value in (-0.1, 1.1)),
    *(("presence_penalty", completion(presence_penalty=value)) for value in (-2.1, 2.1)),
    *(("frequency_penalty", completion(frequency_penalty=value)) for value in (-2.1, 2.1)),
    *(("repetition_penalty", completion(repetition_penalty=value)) for value in (0, -1, 101)),
    *(("top_k", completion(top_k=value)) for value in (-2, 1.5, 2**40)),
    *(("logprobs", completion(logprobs=value)) for value in (21, -1, True)),
    ("top_logprobs", chat(logprobs=True, top_logprobs=21)),
    ("top_logprobs", chat(top_logprobs=2)),
    ("logprobs", chat(logprobs=3)),
    *(
        ("logit_bias", completion(logit_bias=value))
        for value in ({"4096": 1}, {"-1": 1}, {"x": 1}, {"1": 101}, {"1": "1"}, {"²": 1}, [1])
    ),
    ("logit_bias", completion(logit_bias={str(token): 0 for token in range(301)})),
    *(("seed", completion(seed=value)) for value in (2**63, -(2**63) - 1, 1.0, "1", True)),
    ("min_tokens", completion(min_tokens=6, max_tokens=5)),
    ("echo", completion(echo=True)),
    ("stream", completion(stream="yes")),
    ("stream_options", completion(stream_options={"include_usage": True})),
    ("speculative", completion(speculative={"max_rows": -1})),
    ("speculative", completion(speculative=True)),
    *(("timeout", completion(timeout=value)) for value in (0, -1, 1e9, "1")),
    ("messages", chat(messages=[])),
    ("messages", chat(messages="hello")),
    ("messages", chat(messages=[{"role": "tool", "content": "x"}])),
    ("messages", chat(messages=[{"role": "user", "content": 5}])),
    ("messages", chat(messages=[["user", "x"]])),
    ("response_format", completion(response_format={"type": "xml"})),
    ("response_format", completion(response_format=form({"a": "b" * (16 << 10)}))),
    ("response_format", completion(structured_outputs={"regex": "(a|b)" * 5000})),
    ("response_format", completion(structured_outputs={"regex": "a", "json": {}})),
]


def rows() -> Iterator[Any]:
    """(url, body, extra headers, status, code, param where one is expected)"""
    for param, body in WRONG_VALUES:
        url = CHAT if "messages" in body else COMPLETIONS
        yield pytest.param(
            url,
            body,
            {},
            400,
            "invalid_value",
            param,
            id=f"{param}-{json.dumps(body.get(param))[:40]}",
        )
    for name in (
        "unknown",
        "../x",
        "a/b/../../c",
        "/etc/passwd",
        "C:\\",
        "to\0y",
        "hf://toy",
        "x" * 1_000_000,
        "",
    ):
        yield pytest.param(
            COMPLETIONS,
            completion(model=name),
            {},
            404,
            "model_not_found",
            "model",
            id=f"model-{name[:12]!r}",
        )
    yield pytest.param(
        COMPLETIONS, {"prompt": "x"}, {}, 400, "missing_field", "model", id="no-model"
    )
    yield pytest.param(
        COMPLETIONS, {"model": MODEL}, {}, 400, "missing_field", "prompt", id="no-prompt"
    )
    yield pytest.param(
        COMPLETIONS,
        completion(),
        {"authorization": f"Bearer {OTHER}"},
        403,
        "model_not_allowed",
        "model",
        id="model-not-for-key",
    )
    for credentials in ("", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY):
        yield pytest.param(
            COMPLETIONS,
            completion(),
            {"authorization": credentials},
            401,
            "invalid_api_key",
            None,
            id=f"key-{credentials[:9]}",
        )
    for encoding in ("gzip", "br", "gzip, gzip", "identity"):
        yield pytest.param(
            COMPLETIONS,
            completion(),
            {"content-encoding": encoding},
            415,
            "unsupported_encoding",
            None,
            id=encoding,
        )
    for kind in (
        "text/plain",
        "multipart/form-data",
        "application/json; charset=utf-16",
        "application/jsonx",
        "",
    ):
        yield pytest.param(
            COMPLETIONS,
            completion(),
            {"content-type": kind},
            415,
            "unsupported_media_type",
            None,
            id=f"type-{kind}",
        )
    infinite = b'{"model":"toy","prompt":"x","temperature":1e999}'
    yield pytest.param(
        COMPLETIONS, infinite, {}, 400, "invalid_value", "temperature", id="temperature-1e999"
    )
    for what, data in {
        "truncated": b'{"model":"toy","prompt":"x',
        "empty": b"",
        "twice": b'{"model":"toy","model":"toy","prompt":"x"}',
        "twice-inside": b'{"model":"toy","prompt":"x","logit_bias":{"1":1,"1":2}}',
        "nan": b'{"model":"toy","prompt":"x","temperature":NaN}',
        "infinity": b'{"model":"toy","prompt":"x","temperature":-Infinity}',
        "surrogate": b'{"model":"toy","prompt":"\\ud800"}',
        "bom": b'\xef\xbb\xbf{"model":"toy","prompt":"x"}',
        "utf-8": b'{"model":"toy","prompt":"\xff"}',
        "utf-16": json.dumps(completion()).encode("utf-16"),
        "control": b'{"model":"toy","prompt":"a\nb"}',
        "array": b"[]",
        "text": b'"toy"',
        "more": b'{"model":"toy","prompt":"x"} {}',
        "comma": b'{"model":"toy","prompt":"x",}',
        "closed": b"]" * 100_000,
    }.items():
        yield pytest.param(COMPLETIONS, data, {}, 400, "invalid_json", None, id=f"json-{what}")
    for what, data in {
        "deep": deep(33),
        "very-deep": deep(1_000_000),
        "opened": b"[" * 1_000_000,
        "items": json.dumps(completion(prompt=[1] * 10_001)).encode(),
        "values": json.dumps(completion(prompt=[[1] * 9000] * 12)).encode(),
        "digits": b'{"model":"toy","prompt":"x","seed":' + b"9" * 5000 + b"}",
    }.items():
        yield pytest.param(COMPLETIONS, data, {}, 400, "too_complex", None, id=f"complex-{what}")
    for name in (
        "nonsense",
        "chat_template",
        "chat_template_kwargs",
        "logits_processors",
        "lora_path",
        "suffix",
        "tools",
        MARK,
    ):
        yield pytest.param(
            CHAT,
            chat(**{name: "x"}),
            {},
            400,
            "unknown_field",
            name[: limits.ECHO],
            id=f"field-{name[:12]}",
        )
    yield pytest.param(
        CHAT,
        chat(messages=[{"role": "user", "content": "x", "run": 1}]),
        {},
        400,
        "unknown_field",
        "messages.0.run",
        id="field-inside",
    )
    for long in (
        completion(max_tokens=10**18),
        completion(max_tokens=CONTEXT),
        completion(prompt=[1] * CONTEXT),
        completion(prompt=[1] * 9999),
        completion(prompt="a b" * 9000),
    ):
        yield pytest.param(
            COMPLETIONS,
            long,
            {},
            400,
            "context_length_exceeded",
            None,
            id=f"context-{len(str(long))}",
        )
    for address in ("http://169.254.169.254/latest/meta-data", "file:///etc/passwd"):
        yield pytest.param(
            CHAT,
            part("image_url", image_url={"url": address}),
            {},
            400,
            "unsupported_content",
            "messages",
            id=address[:6],
        )
    yield pytest.param(
        CHAT,
        part("file", file={"file_id": "x"}),
        {},
        400,
        "unsupported_content",
        "messages",
        id="file",
    )
    yield pytest.param(
        CHAT,
        part("input_audio", input_audio={}),
        {},
        400,
        "unsupported_content",
        "messages",
        id="audio",
    )
    yield pytest.param(
        CHAT, part("text"), {}, 400, "unsupported_content", "messages", id="text-without-text"
    )
    yield pytest.param(
        CHAT,
        chat(response_format={"type": "json_schema"}),
        {},
        400,
        "missing_field",
        "response_format",
        id="no-schema",
    )
    yield pytest.param(
        CHAT,
        chat(response_format={"type": "regex"}),
        {},
        400,
        "missing_field",
        "response_format",
        id="no-regex",
    )
    yield pytest.param(
        COMPLETIONS,
        completion(),
        {"x-request-timeout": "soon"},
        400,
        "invalid_value",
        "X-Request-Timeout",
        id="timeout-header",
    )
    yield pytest.param(
        COMPLETIONS,
        completion(),
        {"idempotency-key": "a b"},
        400,
        "invalid_value",
        "Idempotency-Key",
        id="idempotency-key",
    )


@pytest.mark.parametrize(("url", "body", "headers", "status", "code", "param"), [*rows()])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_row(
    gateway: Running,
    client: httpx.Client,
    url: str,
    body: Any,
    headers: dict[str, str],
    status: int,
    code: str,
    param: str | None,
    stream: bool,
) -> None:
    if isinstance(body, dict) and stream:
        if "stream" in body or "stream_options" in body:
            pytest.skip("it is about streams itself")
        body = {**body, "stream": True}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(url, content=content, headers={**JSON, **headers})
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["type"] == "invalid_request_error") == (
        code,
        status not in (401, 403),
    )
    assert param is None or error["param"] == param
    assert len(error["message"]) <= 400
    assert MARK[: limits.ECHO + 1] not in answer.text
    assert "x" * (limits.ECHO + 1) not in answer.text
    assert gateway.free()


def test_the_key_is_asked_for_first_and_says_nothing(gateway: Running) -> None:
    """The same answer for every path and every wrong key; health needs none."""
    with gateway.http() as client:
        client.headers.pop("authorization")
        said = {
            client.request(method, path, headers={"authorization": given}).text
            for method, path in (
                ("GET", "/v1/models"),
                ("GET", "/metrics"),
                ("GET", "/version"),
                ("GET", "/nowhere"),
                ("POST", COMPLETIONS),
            )
            for given in ("", "Bearer wrong", f"Bearer {KEY}0")
        }
        assert len(said) == 1
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
    with gateway.http() as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == MODEL
        assert (
            client.get("/v1/models", headers={"authorization": f"Bearer {OTHER}"}).json()["data"]
            == []
        )


@pytest.mark.parametrize("given", ["x" * 65, "a b", "a\tb", "a;b", ""])
def test_a_request_id_that_is_none_is_replaced(gateway: Running, given: str) -> None:
    with gateway.http() as client:
        assert (
            client.get("/health", headers={"x-request-id": "my-own:1"}).headers["x-request-id"]
            == "my-own:1"
        )
        answer = client.get("/health", headers={"x-request-id": given})
        assert len(answer.headers["x-request-id"]) == 32


def test_unknown_addresses_and_methods(gateway: Running) -> None:
    with gateway.http() as client:
        for method, path, status in (
            ("GET", "/nowhere", 404),
            ("GET", COMPLETIONS, 405),
            ("POST", "/health", 405),
            ("GET", "/docs", 404),
        ):
            answer = client.request(method, path)
            assert (answer.status_code, answer.json()["error"]["type"]) == (
                status,
                "invalid_request_error",
            )
        for name in ("..%2f..%2fetc%2fpasswd", "%2e%2e", "a%00b", "x" * 5000):
            assert client.get(f"/v1/models/{name}").status_code == 404


# Below HTTP's surface: bytes as they are sent


def talk(gateway: Running, *sent: bytes | Callable[[], None]) -> bytes:
    """All that comes back until the server closes the connection; it may do so while we are still sending."""
    with socket.create_connection(("127.0.0.1", gateway.port()), timeout=HANG_S) as connection:
        try:
            for data in sent:
                connection.sendall(data) if isinstance(data, bytes) else data()
        except (BrokenPipeError, ConnectionResetError):
            pass
        found = b""
        try:
            while data := connection.recv(65536):
                found += data
        except ConnectionResetError:
            pass
        return found


def head(*lines: str, path: str = COMPLETIONS) -> bytes:
    fixed = (
        f"POST {path} HTTP/1.1",
        "Host: a",
        f"Authorization: Bearer {KEY}",
        "Content-Type: application/json",
        "Connection: close",
    )
    return "\r\n".join((*fixed, *lines, "", "")).encode()


BODY = json.dumps(completion(model="unknown")).encode()


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (head(f"Content-Length: {len(BODY)}") + BODY, {404}),  # it is the odd ones that are refused
        (
            head(f"Content-Length: {len(BODY)}", "Transfer-Encoding: chunked")
            + b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),
            {400},
        ),
        (head(f"Content-Length: {len(BODY)}", "Content-Length: 5") + BODY, {400}),
        (head(f"Content-Length: {len(BODY)}", "Host: b") + BODY, {400}),
        (head("Content-Length: -5"), {400}),
        (head("Transfer-Encoding: gzip, chunked"), {400, 501}),
        (head("X-A: a\r\n b", f"Content-Length: {len(BODY)}") + BODY, {400, 404}),
        (head("X-A: a\0b"), {400}),
        (head("X-A : b"), {400}),
        (head(f"X-A: {'a' * (17 << 10)}"), {400, 431}),
        (head(*(f"X-{number}: a" for number in range(101))), {431}),
        (head(path="/" + "a" * (17 << 10)), {400, 431}),
        (b"GET / HTTP/1.1\r\n\r\n", {400}),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), {400}),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 401, 404, 505}),
    ],
    ids=lambda value: None if isinstance(value, set) else repr(value[-40:]),
)
def test_head(gateway: Running, sent: bytes, statuses: set[int]) -> None:
    assert status_of(talk(gateway, sent)) in statuses


def test_a_body_that_says_it_is_too_large_is_not_read(gateway: Running) -> None:
    assert status_of(talk(gateway, head(f"Content-Length: {limits.BODY_BYTES + 1}"))) == 413
    assert status_of(talk(gateway, head(f"Content-Length: {'9' * 30}"))) in (400, 413)


def test_a_body_without_an_end_is_read_to_the_limit(gateway: Running) -> None:
    piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    answer = talk(
        gateway, head("Transfer-Encoding: chunked"), *[piece] * (limits.BODY_BYTES // 0x10000 + 40)
    )
    assert status_of(answer) == 413
    gateway.eventually(gateway.free)
    with gateway.http() as client:
        assert 'outrider:http_responses_total{code="413"' in client.get("/metrics").text


def test_a_body_and_a_head_that_do_not_come(
    gateway: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", 1.0)
    answer = talk(gateway, head("Content-Length: 100") + b"{")
    assert status_of(answer) == 408
    assert b"connection: close" in answer.lower()
    assert talk(gateway, b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-") == b""
    assert talk(gateway) == b""
    gateway.eventually(gateway.free)


def test_a_head_that_trickles_is_cut_and_a_connection_that_is_used_again_is_not(
    gateway: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four requests in more time than one may take: only a machine that is held up for all of that time would cut the first."""
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.3)

    def pause() -> None:
        time.sleep(0.1)

    def rest() -> None:
        time.sleep(0.9)

    trickle = [
        step
        for letter in b"GET /health HTTP/1.1\r\nHost: a\r\n"
        for step in (bytes([letter]), pause)
    ]
    assert talk(gateway, *trickle) == b""
    monkeypatch.setattr(limits, "BODY_SECONDS", 2.0)
    whole = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
    last = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    assert talk(gateway, whole, rest, whole, rest, whole, rest, last).count(b"200 OK") == 4
