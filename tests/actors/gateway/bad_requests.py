"""The table of bad requests, each with the status, code and parameter of its error."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from runtime.core import limits
from tests.support.gateway import CONTEXT, MODEL, tokenizer
from tests.support.raw_http import CHAT, COMPLETIONS, KEY, OTHER_KEY

MARK = "SECRET" * 40  # long enough that an echo of it is found
JSON = {"content-type": "application/json"}


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
    *(("n", completion(n=value)) for value in (0, 129, 10**9, "2", True, 1.5)),
    ("prompt", completion(prompt=["a"] * 129)),
    ("prompt", completion(prompt=[[1]] * 2049)),
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
    *(("temperature", completion(temperature=value)) for value in (-1, 101, "1", True)),
    *(("top_p", completion(top_p=value)) for value in (1.1, -1)),
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
    ("best_of", completion(best_of=2)),
    ("best_of", completion(best_of=1, n=2)),
    ("best_of", chat(best_of=0)),
    ("echo", completion(echo=1)),
    ("echo", completion(echo="true")),
    ("max_tokens", chat(max_tokens=0)),
    ("max_tokens", completion(echo=False, max_tokens=0)),
    ("logprobs", completion(echo=True, logprobs=20, n=128, prompt="import os " * 60)),
    ("stream", completion(stream="yes")),
    ("stream_options", completion(stream_options={"include_usage": True})),
    ("stream_options", completion(stream_options={"include_obfuscation": True})),
    ("speculative", completion(speculative={"max_rows": -1})),
    ("speculative", completion(speculative=True)),
    *(("timeout", completion(timeout=value)) for value in (0, -1, 1e9, "1")),
    ("messages", chat(messages=[])),
    ("messages", chat(messages="hello")),
    ("messages", chat(messages=[{"role": "tool", "content": "x"}])),
    ("messages", chat(messages=[{"role": "function", "content": "x"}])),
    ("messages", chat(messages=[{"role": "assistant", "content": "x", "tool_calls": [{}]}])),
    ("messages", chat(messages=[{"role": "user", "content": 5}])),
    ("messages", chat(messages=[["user", "x"]])),
    ("response_format", completion(response_format={"type": "xml"})),
    ("response_format", completion(response_format=form({"a": "b" * (16 << 10)}))),
    ("response_format", completion(structured_outputs={"regex": "(a|b)" * 5000})),
    ("response_format", completion(structured_outputs={"regex": "a", "json": {}})),
]


def bad_requests() -> Iterator[Any]:
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
        {"authorization": f"Bearer {OTHER_KEY}"},
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
        "items": json.dumps(completion(prompt=["a"] * 10_001)).encode(),
        "mixed": json.dumps(completion(prompt=[1] * 10_000 + ["a"])).encode(),
        "values": json.dumps(completion(prompt=[["a"] * 9000] * 12)).encode(),
        "ids": json.dumps(completion(prompt=[[1] * 1030] * 1024)).encode(),
        "one-list": b'{"model":"toy","prompt":[' + b"1," * 1_100_000 + b"1]}",
        "booleans": b'{"model":"toy","prompt":[' + b"true," * 200_000 + b"1]}",
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
            name[: limits.ERROR_ECHO_LENGTH],
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
