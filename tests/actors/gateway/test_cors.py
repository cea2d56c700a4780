"""Web pages may use a gateway only if its configuration names their origin."""

from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
from pydantic import ValidationError

from actors.gateway.api_keys import ApiKeys
from runtime.config import GatewayConfig
from tests.support.gateway import MODEL, Running, Scripted, never, serving
from tests.support.raw_http import KEY, answer, connected, ends, head

PAGE, OTHER = "https://app.example.com", "https://app.example.com.evil.org"
COMPLETIONS = "/v1/completions"
ASKS = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}


def allowed(response: httpx.Response) -> dict[str, str]:
    return {
        name.removeprefix("access-control-"): value
        for name, value in response.headers.items()
        if name.startswith("access-control-")
    }


@pytest.fixture(scope="module")
def gateway(keys: ApiKeys) -> Iterator[Running]:
    config = GatewayConfig(port=0, cors_origins=(PAGE, "http://localhost:3000"))
    with serving(Scripted(never), keys=keys, config=config) as running:
        yield running


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/models", "/nowhere"])
def test_a_page_may_ask_without_a_key_what_it_may_send(gateway: Running, path: str) -> None:
    with gateway.http() as http:
        found = http.options(path, headers={"origin": PAGE, **ASKS})
        assert found.status_code == 200
        assert allowed(found) == {
            "allow-origin": PAGE,
            "allow-methods": "GET, POST",
            "allow-headers": "*, Authorization",
            "max-age": "600",
        }
        assert found.headers["vary"] == "Origin"
        assert found.content == b""


def test_a_page_reads_answers_and_errors(gateway: Running) -> None:
    with gateway.http() as http:
        bearer = {"authorization": f"Bearer {KEY}", "origin": PAGE}
        answers = [
            http.get("/v1/models", headers=bearer),
            http.get("/v1/models", headers={"origin": PAGE}),
            http.post(COMPLETIONS, headers=bearer, json={"model": MODEL}),
            http.get("/nowhere", headers=bearer),
            http.get("/health", headers={**bearer, "x-long": "x" * 20_000}),
        ]
    assert [found.status_code for found in answers[:4]] == [200, 401, 400, 404]
    for found in answers[:4]:
        assert allowed(found) == {
            "allow-origin": PAGE,
            "expose-headers": "Retry-After, X-Request-Id, X-Should-Retry",
        }


@pytest.mark.parametrize("origin", [OTHER, "null", "http://app.example.com", "*", ""])
def test_other_pages_are_told_nothing(gateway: Running, origin: str) -> None:
    with gateway.http() as http:
        for found in (
            http.options(COMPLETIONS, headers={"origin": origin, **ASKS}),
            http.get("/health", headers={"origin": origin}),
        ):
            assert allowed(found) == {}
            assert found.headers["vary"] == "Origin"


def test_options_alone_needs_a_key_and_is_no_method(gateway: Running) -> None:
    with gateway.http() as http:
        assert http.options(COMPLETIONS, headers={"origin": PAGE}).status_code == 401
        bearer = {"authorization": f"Bearer {KEY}"}
        assert http.options(COMPLETIONS, headers=bearer).status_code == 405


def test_a_question_with_a_body_that_never_comes_ends_its_connection(gateway: Running) -> None:
    lines = [f"Origin: {PAGE}", *(f"{name}: {value}" for name, value in ASKS.items())]
    with connected(gateway) as connection:
        connection.sendall(head("OPTIONS", COMPLETIONS, *lines, "Content-Length: 1000", key=None))
        status, first, _ = answer(connection)
        assert status == 200
        assert b"connection: close" in first
        assert ends(connection)


def test_a_star_lets_all_pages_in_and_is_off_by_default() -> None:
    everybody = GatewayConfig(port=0, cors_origins=("*",))
    with serving(Scripted(never), config=everybody) as gateway, gateway.http() as http:
        found = http.options(COMPLETIONS, headers={"origin": OTHER, **ASKS})
        assert (found.status_code, allowed(found)["allow-origin"]) == (200, "*")
        assert "vary" not in found.headers
    with serving(Scripted(never)) as gateway, gateway.http() as http:
        found = http.options(COMPLETIONS, headers={"origin": PAGE, **ASKS})
        assert (found.status_code, allowed(found)) == (405, {})
        assert "vary" not in found.headers


@pytest.mark.parametrize(
    "origin", ["app.example.com", f"{PAGE}/", f"{PAGE}/a", "https://*.example.com", "", "a, b"]
)
def test_what_is_no_origin_is_refused(origin: Any) -> None:
    with pytest.raises(ValidationError):
        GatewayConfig(cors_origins=(origin,))
