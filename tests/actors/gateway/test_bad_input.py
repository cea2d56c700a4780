"""Each kind of bad input gets its error. None reaches a target or is echoed at length."""

import json
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest

from runtime.core import limits
from tests.actors.gateway.bad_requests import JSON, MARK, bad_requests
from tests.support.gateway import MODEL, Running
from tests.support.raw_http import COMPLETIONS, KEY, OTHER_KEY

BEARER = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def gateway(gateway: Running) -> Running:
    gateway.headers.update(BEARER)
    return gateway


@pytest.fixture(scope="module")
def client(gateway: Running) -> Iterator[httpx.Client]:
    with gateway.http() as client:
        yield client


@pytest.mark.parametrize(("url", "body", "headers", "status", "code", "param"), [*bad_requests()])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_bad_input_gets_its_error(
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
            pytest.skip("this input is about streams")
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
    assert MARK[: limits.ERROR_ECHO_LENGTH + 1] not in answer.text
    assert "x" * (limits.ERROR_ECHO_LENGTH + 1) not in answer.text
    assert gateway.free()


def test_a_missing_or_wrong_key_gets_the_same_answer_everywhere(gateway: Running) -> None:
    """The answer does not depend on the path or the wrong key; the health probes need no key."""
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
            client.get("/v1/models", headers={"authorization": f"Bearer {OTHER_KEY}"}).json()[
                "data"
            ]
            == []
        )


@pytest.mark.parametrize("given", ["x" * 65, "a b", "a\tb", "a;b", ""])
def test_an_invalid_request_id_is_replaced(gateway: Running, given: str) -> None:
    with gateway.http() as client:
        assert (
            client.get("/health", headers={"x-request-id": "my-own:1"}).headers["x-request-id"]
            == "my-own:1"
        )
        answer = client.get("/health", headers={"x-request-id": given})
        assert len(answer.headers["x-request-id"]) == 32


def test_unknown_paths_and_methods_are_refused(gateway: Running) -> None:
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
