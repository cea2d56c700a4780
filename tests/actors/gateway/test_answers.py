"""The gateway translates scripted target replies: logprobs, errors, and requests to targets."""

from collections.abc import AsyncGenerator
from typing import Any

import openai
import pytest

from actors.openai.protocol import parse_body
from actors.openai.request_adapter import build_requests
from actors.openai.response_builder import chat_logprobs, completion_logprobs
from runtime.config import LimitsConfig
from runtime.core.errors import InvalidRequest, Overloaded, TargetsLost, Unavailable
from runtime.core.messages import Chunk, Logprob, Request, Stats
from runtime.core.sampling_params import Constraint
from tests.support.gateway import CONTEXT, MODEL, Scripted, served, serving, tokenizer

MESSAGES: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a tree?"},
]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def figures(completion: int = 3, reused: int = 0) -> Stats:
    return Stats(2, completion, completion, 4, 4, 2, 1, (1, 2), {"d": 2}, reused=reused)


LOGPROBS = (
    Logprob(-0.5, ((619, -0.5), (580, -1.0))),
    Logprob(-3.0, ((580, -0.25), (619, -2.0))),
    Logprob(-0.125, ((0, -0.125),)),
)
IDS = (619, 261, 0)


async def with_logprobs(request: Request) -> AsyncGenerator[Chunk, None]:
    assert request.sampling.logprobs == 2
    yield Chunk(("import", ""), IDS[:2], ("d", ""), logprobs=LOGPROBS[:2])
    yield Chunk((" é",), IDS[2:], ("",), "stop", figures(reused=9), logprobs=LOGPROBS[2:])


def word(token: int) -> str:
    return str(tokenizer().decode([token]))


def test_logprobs_of_completions() -> None:
    with serving(Scripted(with_logprobs)) as gateway, gateway.openai() as client:
        whole = client.completions.create(
            model=MODEL, prompt="import os", logprobs=2, extra_body={"seed": 1}
        )
        found = whole.choices[0].logprobs
        assert found is not None
        assert found.tokens == [word(token) for token in IDS]
        assert found.token_logprobs == [-0.5, -3.0, -0.125]
        assert found.text_offset == [0, 6, 8]
        assert found.top_logprobs == [
            {word(619): -0.5, word(580): -1.0},
            {word(580): -0.25, word(619): -2.0, word(261): -3.0},
            {word(0): -0.125},
        ]
        streamed: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "text_offset": [],
            "top_logprobs": [],
        }
        for event in client.completions.create(
            model=MODEL, prompt="import os", logprobs=2, stream=True
        ):
            for choice in event.choices:
                assert choice.logprobs is not None
                for name, values in streamed.items():
                    values.extend(getattr(choice.logprobs, name))
        assert streamed == found.model_dump(include=set(streamed))
        assert whole.usage is not None
        assert whole.usage.prompt_tokens_details.cached_tokens == 2  # type: ignore[union-attr]


def test_logprobs_of_chats() -> None:
    with serving(Scripted(with_logprobs)) as gateway, gateway.openai() as client:
        whole = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=2
        )
        found = whole.choices[0].logprobs
        assert found is not None
        assert found.content is not None
        assert [(entry.token, entry.logprob) for entry in found.content] == list(
            zip(map(word, IDS), (-0.5, -3.0, -0.125), strict=True)
        )
        assert found.content[0].bytes == list(b"import")
        assert [(top.token, top.logprob) for top in found.content[1].top_logprobs] == [
            (word(580), -0.25),
            (word(619), -2.0),
        ]
        streamed = [
            entry
            for event in client.chat.completions.create(
                model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=2, stream=True
            )
            for choice in event.choices
            if choice.logprobs is not None
            for entry in choice.logprobs.content or ()
        ]
        assert [entry.model_dump() for entry in streamed] == [
            entry.model_dump() for entry in found.content
        ]


def test_the_bytes_of_a_character_that_is_spread_over_tokens() -> None:
    ids = tokenizer().encode("é")
    pieces = served().byte_tokenizer
    entries = chat_logprobs(pieces, ids, [Logprob(-1.0)] * len(ids), range(len(ids)))["content"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]) == "é".encode()
    assert completion_logprobs(pieces, ids, [Logprob(-1.0)] * len(ids), [0] * len(ids))[
        "token_logprobs"
    ] == [-1.0] * len(ids)


@pytest.mark.parametrize(
    ("asked", "constraint"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Constraint("json_object")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {
                        "name": "x",
                        "strict": True,
                        "schema": {"type": "object", "a": None},
                    },
                }
            },
            Constraint("json_schema", '{"type":"object","a":null}'),
        ),
        ({"response_format": {"type": "regex", "regex": "[ab]+"}}, Constraint("regex", "[ab]+")),
        ({"structured_outputs": {"regex": "[ab]+"}}, Constraint("regex", "[ab]+")),
        (
            {"structured_outputs": {"json": {"$ref": "#/$defs/a", "$defs": {"a": {}}}}},
            Constraint("json_schema", '{"$ref":"#/$defs/a","$defs":{"a":{}}}'),
        ),
        (
            {"structured_outputs": {"json": '{"type": "string"}'}},
            Constraint("json_schema", '{"type": "string"}'),
        ),
    ],
    ids=lambda value: None if isinstance(value, Constraint) else str(value)[:60],
)
def test_the_form_of_the_output(asked: dict[str, Any], constraint: Constraint | None) -> None:
    body, _ = parse_body(COMPLETIONS, {"model": MODEL, "prompt": "x", **asked})
    assert build_requests(body, served(), "s", 0)[0].sampling.constraint == constraint


def test_what_is_asked_of_targets() -> None:
    body, ignored = parse_body(
        CHAT,
        {
            "model": MODEL,
            "messages": MESSAGES,
            "n": 2,
            "seed": 2**63 - 1,
            "speculative": {"max_rows": 0},
            "more": [],
            "top_k": -1,
            "logprobs": True,
        },
        strict=False,
    )
    first, second = build_requests(body, served(), "name", 0, 7.5)
    assert ignored == ("more",)
    assert (first.session, second.session) == ("name-0", "name-1")
    assert (first.sampling.seed, second.sampling.seed) == (2**63 - 1, -(2**63))
    assert (
        first.deadline,
        first.speculation,
        first.max_rows,
        first.sampling.top_k,
        first.sampling.logprobs,
    ) == (7.5, False, None, 0, 0)
    assert (first.sampling.temperature, first.sampling.max_tokens) == (
        1.0,
        CONTEXT - len(first.prompt),
    )
    body, _ = parse_body(
        COMPLETIONS, {"model": MODEL, "prompt": ["a", [1, 2]], "speculative": {"max_rows": 3}}
    )
    assert [
        (request.prompt, request.max_rows, request.sampling.seed)
        for request in build_requests(body, served(), "s", 9)
    ] == [
        (tuple(tokenizer().encode("a")), 3, 9),
        ((1, 2), 3, 9),
    ]


def refusing(error: Exception) -> Any:
    async def speak(request: Request) -> AsyncGenerator[Chunk, None]:
        if request.prompt:
            raise error
        yield Chunk((), (), ())

    return speak


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (
            InvalidRequest("the schema has no meaning", "response_format"),
            openai.BadRequestError,
            "invalid_value",
        ),
        (Overloaded("1280 sessions are under way"), openai.InternalServerError, "overloaded"),
        (Unavailable("target at 10.0.0.1:99 is lost"), openai.InternalServerError, "unavailable"),
        (TargetsLost("2 targets died"), openai.InternalServerError, "targets_lost"),
    ],
    ids=["invalid", "overloaded", "unavailable", "lost"],
)
def test_what_a_target_refuses_is_refused_before_a_stream_begins(
    error: Exception, kind: Any, code: str, stream: bool
) -> None:
    with serving(Scripted(refusing(error))) as gateway, gateway.openai() as client:
        with pytest.raises(kind) as refused:
            client.completions.create(model=MODEL, prompt="x", n=3, stream=stream)
        assert refused.value.code == code
        assert "10.0.0.1" not in str(refused.value)
        if code == "targets_lost":
            assert (
                refused.value.status_code,
                refused.value.response.headers["x-should-retry"],
            ) == (500, "false")
        elif kind is openai.InternalServerError:
            assert (refused.value.status_code, refused.value.response.headers["retry-after"]) == (
                503,
                "1",
            )
        gateway.eventually(gateway.free)


async def falls_silent(request: Request) -> AsyncGenerator[Chunk, None]:
    yield Chunk(("a", "b"), (5, 6), ("", "d"))
    yield Chunk((), (), (), "deadline", figures(2))


async def says_what_it_held(request: Request) -> AsyncGenerator[Chunk, None]:
    yield Chunk(("a", ""), (5, 6), ("", "d"))
    yield Chunk(("b",), (), ())
    yield Chunk((), (), (), "deadline", figures(2))


async def fails(request: Request) -> AsyncGenerator[Chunk, None]:
    yield Chunk(("a", "b"), (5, 6), ("", "d"))
    yield Chunk((), (), (), "error", figures(2), error="it says SECRET")


@pytest.mark.parametrize(
    ("speak", "status", "code"),
    [
        (falls_silent, 504, "deadline_exceeded"),
        (says_what_it_held, 504, "deadline_exceeded"),
        (fails, 500, "target_failed"),
    ],
)
def test_an_end_that_is_none_is_an_error_with_what_was_used(
    speak: Any, status: int, code: str
) -> None:
    with serving(Scripted(speak)) as gateway, gateway.http() as http, gateway.openai() as client:
        answer = http.post(COMPLETIONS, json={"model": MODEL, "prompt": "import os"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert answer.json()["usage"]["completion_tokens"] == 2
        assert "SECRET" not in answer.text
        texts = []
        with pytest.raises(openai.APIError) as caught:  # noqa: PT012 - it comes in mid-stream
            for event in client.completions.create(model=MODEL, prompt="import os", stream=True):
                texts += [choice.text for choice in event.choices]
        assert "".join(texts) == "ab"
        assert caught.value.code == code
        assert http.post(
            COMPLETIONS, json={"model": MODEL, "prompt": "x", "stream": True}
        ).text.endswith("data: [DONE]\n\n")


def test_unknown_fields_are_counted_where_they_are_not_refused() -> None:
    async def short(request: Request) -> AsyncGenerator[Chunk, None]:
        yield Chunk(("a",), (5,), ("",), "stop", figures(1))

    with serving(Scripted(short), LimitsConfig(strict=False)) as lenient, lenient.http() as http:
        answer = http.post(
            CHAT,
            json={
                "model": MODEL,
                "messages": [{"role": "user", "content": "x", "odd": 1}],
                "tools": [{}],
                "more": {"a": 1},
            },
        )
        assert answer.status_code == 200
        assert 'outrider:ignored_fields_total{model_name="toy"} 3.0' in http.get("/metrics").text
        body = {"model": MODEL, "messages": MESSAGES, "chat_template": "{{ 1 }}"}
        assert http.post(CHAT, json=body).json()["error"]["code"] == "unknown_field"
