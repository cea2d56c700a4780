"""No malformed request from the gateway's own schema gets a 5xx or disturbs a stream."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from tests.support.gateway import MODEL, Running, serving
from tests.support.harness import HANG_S

EXAMPLES = int(os.environ.get("OUTRIDER_TEST_MALFORMED", "100"))
CANARY = {"model": MODEL, "prompt": "import os", "seed": 1, "max_tokens": 20}
KEPT = {
    "model": MODEL,
    "max_tokens": 4,
    "min_tokens": 0,
    "n": 1,
    "timeout": 5,
}  # of bodies that may be right: they need not be long


@pytest.fixture(scope="module")
def gateway() -> Iterator[Running]:
    with serving() as running:
        yield running


def operations(app: Any) -> list[Any]:
    schema: Any = schemathesis.openapi.from_dict(app.openapi())
    return [found.ok() for found in schema.get_all_operations()]


def test_no_malformed_request_is_answered_with_5xx(gateway: Running) -> None:
    found: dict[int, int] = {}
    with gateway.http() as client:
        expected = client.post("/v1/completions", json=CANARY).json()["choices"]
        todo = [
            operation for operation in operations(gateway.app) if operation.method.upper() == "POST"
        ]
        assert [operation.path for operation in todo] == ["/v1/completions", "/v1/chat/completions"]
        for operation in todo:
            malformed(
                gateway,
                operation.as_strategy(generation_mode=GenerationMode.NEGATIVE),
                EXAMPLES * 3 // 8,
                {},
                found,
            )
            malformed(
                gateway,
                operation.as_strategy(generation_mode=GenerationMode.POSITIVE),
                EXAMPLES // 8,
                KEPT,
                found,
            )
        assert client.post("/v1/completions", json=CANARY).json()["choices"] == expected
    gateway.eventually(gateway.free)
    assert sum(found.values()) >= EXAMPLES * 0.9
    assert found.get(400, 0) > sum(found.values()) // 3


def malformed(
    gateway: Running, cases: Any, count: int, kept: dict[str, Any], found: dict[int, int]
) -> None:
    """Sends so many of these cases, with `kept` in their bodies; counts the answers by status."""

    @settings(
        max_examples=count,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def ask(case: Any) -> None:
        if kept and isinstance(case.body, dict):
            case.body = {**case.body, **kept}
        reply = case.call(base_url=gateway.url, timeout=HANG_S)
        found[reply.status_code] = found.get(reply.status_code, 0) + 1
        assert reply.status_code < 500, (case.body, reply.content)

    ask()


def test_every_address_is_described(gateway: Running) -> None:
    described = {
        (operation.method.upper(), operation.path) for operation in operations(gateway.app)
    }
    assert described == {
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        *(
            ("GET", path)
            for path in (
                "/v1/models",
                "/v1/models/{name}",
                "/health",
                "/ready",
                "/version",
                "/metrics",
            )
        ),
    }
