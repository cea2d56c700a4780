"""Refusing long lists and many unknown fields costs the gateway little."""

from typing import Any

import pytest
from pydantic import ValidationError

from actors.openai.protocol import BODY_TYPES
from runtime.config import LimitsConfig
from tests.support.gateway import MODEL, Scripted, never, serving
from tests.support.raw_http import CHAT, COMPLETIONS

WRONG: dict[str, dict[str, Any]] = {
    "lists": {"prompt": [["a"] * 9000] * 8},
    "numbers": {"prompt": [[1.5] * 9000] * 8},
    "objects": {"prompt": [{}] * 10_000},
    "late": {"prompt": [[1] * 9000] * 7 + [[1] * 8999 + ["a"]]},
    "parts": {"messages": [{"role": "user", "content": [1] * 9000}] * 8},
    "stop": {"stop": [1] * 9000},
}


@pytest.mark.parametrize("which", WRONG)
def test_validation_of_a_long_wrong_list_stops_early(which: str) -> None:
    """The errors are what costs: 72,000 of them took most of a second."""
    kind = BODY_TYPES[CHAT if which == "parts" else COMPLETIONS]
    with pytest.raises(ValidationError) as wrong:
        kind.model_validate({"model": MODEL, **WRONG[which]})
    assert wrong.value.error_count() <= 32


@pytest.mark.parametrize("strict", [True, False])
def test_too_many_unknown_fields_are_refused_without_listing_them(strict: bool) -> None:
    message = {"role": "user", "content": "x"} | {f"field{number}": 1 for number in range(8)}
    with serving(Scripted(never), LimitsConfig(strict=strict)) as gateway, gateway.http() as client:
        reply = client.post(CHAT, json={"model": MODEL, "messages": [message] * 8000})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "too_complex")
