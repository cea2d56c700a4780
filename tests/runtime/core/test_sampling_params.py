"""Sampling parameters are refused by name."""

from collections.abc import Callable
from typing import Any

import pytest

from runtime.core import limits
from runtime.core.errors import InvalidRequest
from runtime.core.sampling_params import Constraint, SamplingParams

build: Callable[..., SamplingParams] = SamplingParams
BAD: list[tuple[str, object]] = [
    *((name, value) for name in ("temperature", "top_p", "min_p", "repetition_penalty",
                                     "presence_penalty", "frequency_penalty")
      for value in (float("nan"), float("inf"), float("-inf"), 10**400, "1", True, None)),
    *((name, value) for name in ("top_k", "seed", "max_tokens", "min_tokens")
      for value in (1.5, True, "5", None, 10**18 * 100)),
    ("temperature", -0.1), ("temperature", 100.1),
    ("top_k", -1), ("top_p", -0.1), ("top_p", 1.01), ("min_p", -0.1), ("min_p", 1.1),
    ("repetition_penalty", 0.0), ("repetition_penalty", -1.0),
    ("presence_penalty", 2.1), ("frequency_penalty", -2.1),
    ("seed", 2**63), ("seed", -(2**63) - 1), ("max_tokens", 0), ("max_tokens", -1),
    ("max_tokens", 2**31), ("min_tokens", -1),
    ("min_tokens", 129),
    ("stop", ("",)), ("stop", ("x" * (limits.STOP_LENGTH + 1),)),
    ("stop", ("a", "b", "c", "d", "e")),
    ("stop", (7,)),
    ("logit_bias", ((1, float("nan")),)), ("logit_bias", ((1, 101.0),)),
    ("logit_bias", tuple((i, 0.0) for i in range(limits.LOGIT_BIAS + 1))),
    ("logit_bias token", ((-1, 0.0),)), ("logit_bias token", ((1.0, 0.0),)),
    ("logprobs", -1), ("logprobs", limits.LOGPROBS + 1), ("logprobs", True), ("logprobs", 1.0),
    ("prompt_logprobs", -1), ("prompt_logprobs", limits.LOGPROBS + 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("param", "value"), BAD, ids=[f"{param}-{number}" for number, (param, _) in enumerate(BAD)]
)
def test_refused_with_the_name(param: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        build(**{param.removesuffix(" token"): value})
    assert caught.value.param == param
    message = str(caught.value)
    assert param in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"temperature": 0},
        {"temperature": 0.001},
        {"temperature": 100},
        {"top_p": 1, "min_p": 1, "top_k": 1},
        {"top_p": 0},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"max_tokens": 1, "min_tokens": 1},
        {"stop": ("x" * limits.STOP_LENGTH, "é", "\n", " ")},
        {"logit_bias": ((0, -100.0), (2**31 - 1, 100))},
        {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 0.01},
        {"logprobs": None},
        {"prompt_logprobs": 0, "max_tokens": 0},
        {"prompt_logprobs": limits.LOGPROBS},
        {"logprobs": 0},
        {"logprobs": limits.LOGPROBS, "constraint": Constraint("json_object")},
        {"constraint": Constraint("regex", "a" * limits.CONSTRAINT_BYTES)},
    ],
    ids=str,
)
def test_accepted(parameters: dict[str, object]) -> None:
    assert {name: getattr(build(**parameters), name) for name in parameters} == parameters


@pytest.mark.parametrize("temperature", [1e-8, 1e-300, 5e-324, 0.000999])
def test_a_temperature_of_almost_nothing_is_greedy(temperature: float) -> None:
    assert SamplingParams(temperature=temperature) == SamplingParams(temperature=0.0)


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("xml", "a", "unknown constraint 'xml': give json_object, json_schema, regex"),
        ("regex", "", "regex is empty"),
        ("json_schema", "", "json_schema is empty"),
        ("regex", "a" * (limits.CONSTRAINT_BYTES + 1), "regex of 16385 bytes: at most 16384"),
        ("json_schema", "é" * (limits.CONSTRAINT_BYTES // 2 + 1), "json_schema of 16386 bytes"),
    ],
)
def test_a_constraint_without_sense_is_refused_as_the_response_format(
    kind: Any, text: str, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        Constraint(kind, text)
    assert caught.value.param == "response_format"
