"""OpenAI's client gets the target's text from the gateway, whole and streamed, and its errors."""

import json
import re
import uuid
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from actors.openai.protocol import parse_body
from actors.openai.request_adapter import build_requests
from runtime.models import grammar_check
from tests.support.gateway import CONTEXT, MODEL, Running, Scripted, never, serving, tokenizer
from tests.support.harness import Output, answer

PROMPTS = ["import os", "def f(x):\n    return", "é𝄞"]
MESSAGES: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a tree?"},
]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def gateway() -> Iterator[Running]:
    with serving() as running:
        yield running
        running.eventually(running.free)


@pytest.fixture(scope="module")
def client(gateway: Running) -> Iterator[openai.OpenAI]:
    with gateway.openai() as client:
        yield client


def direct(gateway: Running, url: str, body: dict[str, Any]) -> list[Output]:
    """What the target itself says to the requests that the body means."""
    found, _ = parse_body(url, body)
    return [
        gateway.network.run(answer(gateway.body, request))
        for request in build_requests(found, gateway.service.served, uuid.uuid4().hex, 0)
    ]


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": 0},
        {"seed": 5},
        {"seed": 2**63 - 1, "n": 2},
        {"seed": -4, "temperature": 0.7, "top_p": 0.9, "n": 3},
        {"seed": 6, "stop": ["e", "\n"]},
        {
            "seed": 7,
            "presence_penalty": 1.5,
            "frequency_penalty": -0.5,
            "logit_bias": {"100": 5, "200": -100},
        },
        {
            "seed": 8,
            "extra_body": {
                "top_k": 5,
                "min_p": 0.01,
                "repetition_penalty": 1.2,
                "min_tokens": 3,
                "ignore_eos": True,
            },
        },
        {"seed": 9, "extra_body": {"speculative": {"enabled": False}}},
        {"seed": 9, "extra_body": {"speculative": {"max_rows": 1}}},
    ],
    ids=str,
)
def test_streamed_and_whole_and_from_the_target_itself_it_is_one_text(
    gateway: Running, client: openai.OpenAI, parameters: Any
) -> None:
    body = {
        "model": MODEL,
        "max_tokens": 16,
        **{key: value for key, value in parameters.items() if key != "extra_body"},
    }
    extra = parameters.get("extra_body", {})
    expected = direct(gateway, COMPLETIONS, {**body, "prompt": PROMPTS, **extra})
    whole = client.completions.create(**body, prompt=PROMPTS, extra_body=extra)
    assert [(choice.text, choice.finish_reason) for choice in whole.choices] == [
        (found.text, found.reason) for found in expected
    ]
    assert [choice.index for choice in whole.choices] == list(range(len(expected)))
    assert whole.usage is not None
    assert whole.usage.completion_tokens == sum(len(found.tokens) for found in expected)
    assert whole.usage.prompt_tokens == sum(len(tokenizer().encode(prompt)) for prompt in PROMPTS)

    texts, reasons = [""] * len(expected), [""] * len(expected)
    usage = None
    for event in client.completions.create(
        **body,
        prompt=PROMPTS,
        extra_body=extra,
        stream=True,
        stream_options={"include_usage": True},
    ):
        for choice in event.choices:
            assert reasons[choice.index] == ""
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or ""
        usage = event.usage or usage
    assert list(zip(texts, reasons, strict=True)) == [
        (found.text, found.reason) for found in expected
    ]
    assert usage is not None
    assert usage.total_tokens == whole.usage.total_tokens


def test_a_chat_is_the_templates_text(gateway: Running, client: openai.OpenAI) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 20, "seed": 3, "n": 2}
    expected = direct(gateway, CHAT, body)
    text = "<system>Be brief.\n<user>What is a tree?\n<assistant>"
    same = direct(
        gateway, COMPLETIONS, {"model": MODEL, "prompt": text, "max_tokens": 20, "seed": 3, "n": 2}
    )
    assert [found.said() for found in expected] == [found.said() for found in same]

    whole = client.chat.completions.create(**body)  # type: ignore[call-overload]
    assert [(choice.message.role, choice.message.content) for choice in whole.choices] == [
        ("assistant", found.text) for found in expected
    ]
    texts = [""] * 2
    roles: list[Any] = []
    for event in client.chat.completions.create(**body, stream=True):  # type: ignore[call-overload]
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
    assert texts == [found.text for found in expected]
    assert roles == ["assistant"] * 2


def test_parts_of_text_developers_and_fields_that_mean_nothing_here(
    gateway: Running, client: openai.OpenAI
) -> None:
    parts: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is a tree?"}]},
    ]
    extras: Any = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "x",
        "prompt_cache_key": "y",
    }
    one = client.chat.completions.create(
        model=MODEL, messages=parts, max_completion_tokens=9, max_tokens=3, seed=1, **extras
    )
    other = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=9, seed=1, tools=openai.omit
    )
    assert one.choices[0].message.content == other.choices[0].message.content
    history: Any = [
        *MESSAGES,
        one.choices[0].message.model_dump(),
        {"role": "user", "content": "Why?"},
    ]  # with fields that are null
    assert (
        client.chat.completions.create(model=MODEL, messages=history, max_tokens=3).usage
        is not None
    )


def test_what_an_answer_says_of_its_making(client: openai.OpenAI) -> None:
    found: Any = client.completions.create(
        model=MODEL, prompt="import os", max_tokens=40, seed=11, n=2
    )
    metrics = found.metrics
    assert found.seed == 11
    assert (
        metrics["speculative_decoding"]["num_accepted_tokens"]
        == sum(metrics["outrider"]["accepted_by_drafter"].values())
        > 0
    )
    alone: Any = client.completions.create(
        model=MODEL,
        prompt="import os",
        max_tokens=40,
        seed=11,
        n=2,
        extra_body={"speculative": {"enabled": False}},
    )
    assert [choice.text for choice in alone.choices] == [choice.text for choice in found.choices]
    assert alone.metrics["speculative_decoding"]["num_draft_tokens"] == 0
    *_, last = client.completions.create(model=MODEL, prompt="import os", max_tokens=5, stream=True)
    assert last.metrics["speculative_decoding"]["num_drafts"] >= 0  # type: ignore[attr-defined]


def test_without_a_seed_each_answer_is_another(client: openai.OpenAI) -> None:
    texts = {
        client.completions.create(model=MODEL, prompt="a", max_tokens=12).choices[0].text
        for _ in range(3)
    }
    assert len(texts) == 3


def test_without_a_maximum_the_context_is_filled(client: openai.OpenAI) -> None:
    found = client.completions.create(
        model=MODEL, prompt=[5] * (CONTEXT - 30), extra_body={"ignore_eos": True}
    )
    assert found.usage is not None
    assert found.usage.total_tokens == CONTEXT
    assert found.choices[0].finish_reason == "length"


def test_models_and_errors_are_openais(gateway: Running, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("other")
    assert missing.value.code == "model_not_found"
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as bad:
            client.completions.create(model=MODEL, prompt="a", max_tokens=CONTEXT, stream=stream)
        assert (bad.value.code, bad.value.param, bad.value.type) == (
            "context_length_exceeded",
            "max_tokens",
            "invalid_request_error",
        )
    gateway.eventually(gateway.free)


def test_a_model_without_a_template_has_no_chat() -> None:
    with serving(Scripted(never), template=None) as gateway, gateway.openai() as client:
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(model=MODEL, messages=MESSAGES)
        assert bad.value.code == "no_chat_template"


# Logprobs and forms, from the target itself


def test_logprobs_do_not_depend_on_how_they_come(client: openai.OpenAI) -> None:
    body: Any = {"model": MODEL, "prompt": "import os", "max_tokens": 12, "seed": 4, "logprobs": 3}
    whole = client.completions.create(**body).choices[0].logprobs
    alone = (
        client.completions.create(**body, extra_body={"speculative": {"enabled": False}})
        .choices[0]
        .logprobs
    )
    assert whole is not None
    assert whole == alone
    assert whole.token_logprobs is not None
    assert len(whole.token_logprobs) == len(whole.tokens or ()) == 12
    assert all(logprob is not None and logprob < 0 for logprob in whole.token_logprobs)
    streamed = [
        event.choices[0].logprobs for event in client.completions.create(**body, stream=True)
    ]
    assert [token for found in streamed if found for token in found.tokens or ()] == whole.tokens
    assert [
        logprob for found in streamed if found for logprob in found.token_logprobs or ()
    ] == whole.token_logprobs


def test_text_offsets_do_not_depend_on_stop_strings(client: openai.OpenAI) -> None:
    """A stop string that begins often and never ends holds text back, but moves no token."""
    body: Any = {"model": MODEL, "prompt": "import os", "max_tokens": 24, "seed": 5, "logprobs": 0}
    free = client.completions.create(**body).choices[0]
    assert free.logprobs is not None
    words = free.logprobs.tokens or []
    sizes = [len(word) for word in words]
    assert free.logprobs.text_offset == [sum(sizes[:place]) for place in range(len(sizes))]
    stops = [free.text[start : start + 40] + "QQQ" for start in (0, 30, 60)]
    stopped = client.completions.create(**body, stop=stops).choices[0]
    assert (stopped.text, stopped.logprobs) == (free.text, free.logprobs)
    streamed = [
        offset
        for event in client.completions.create(**body, stop=stops, stream=True)
        for offset in (event.choices[0].logprobs and event.choices[0].logprobs.text_offset) or ()
    ]
    assert streamed == free.logprobs.text_offset


@pytest.mark.parametrize("speculation", [True, False], ids=["on", "off"])
def test_the_output_has_the_form_that_was_asked_for(
    client: openai.OpenAI, speculation: bool
) -> None:
    extra: dict[str, Any] = {"speculative": {"enabled": speculation}}
    regex = client.completions.create(
        model=MODEL,
        prompt="import os",
        seed=1,
        extra_body={**extra, "structured_outputs": {"regex": "[ab]{3}-[0-9]{2}"}},
    )
    assert re.fullmatch("[ab]{3}-[0-9]{2}", regex.choices[0].text)
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    found = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, seed=1, response_format=form, extra_body=extra
    )
    assert set(json.loads(found.choices[0].message.content or "")) == {"a"}


def test_a_form_that_never_compiles_is_refused_and_other_texts_go_on(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check by name lets it through here: the process that compiles it has to end."""
    monkeypatch.setattr(grammar_check, "MAX_REGEX_PRODUCT", 10**99)
    strings = [{"type": "string", "pattern": f"^(a|b)*a(a|b){{{i}}}$"} for i in range(1, 32)]
    good: Any = {
        "model": MODEL,
        "prompt": "x",
        "extra_body": {"structured_outputs": {"regex": "[ab]{200}"}},
    }
    with client.completions.create(**good, stream=True) as events:
        text = next(iter(events)).choices[0].text
        form = {"structured_outputs": {"json": {"allOf": strings}}, "timeout": 30}
        with pytest.raises(openai.BadRequestError, match="too complex") as bad:
            client.completions.create(model=MODEL, prompt="x", extra_body=form)
        text += "".join(event.choices[0].text for event in events)
    assert bad.value.param == "response_format"
    assert re.fullmatch("[ab]{200}", text)
    assert re.fullmatch("[ab]{200}", client.completions.create(**good).choices[0].text)


RECURSIVE = {
    "$defs": {"node": {"properties": {"next": {"$ref": "#/$defs/node"}}}},
    "$ref": "#/$defs/node",
}


@pytest.mark.parametrize(
    "form",
    [
        {"json": RECURSIVE},
        {"json": {"properties": {"a": {"$ref": "http://169.254.169.254/schema"}}}},
        {"json": {"$ref": "file:///etc/passwd"}},
        {"json": {"type": "nonsense"}},
        {"json": "[" * 16_000},
        {"json": '{"a": SECRETSECRETSECRETSECRETSECRETSECRETSECRETSECRETSECRETSECRETSECRETSECRET'},
        {
            "json": {
                "allOf": [
                    {"type": "string", "pattern": f"^(a|b)*a(a|b){{{i}}}$"} for i in range(1, 32)
                ]
            }
        },
        {"json": {"properties": {f"p{i}": {"enum": [0, 1]} for i in range(600)}}},
        {"regex": "(a|"},
        {"regex": "(a{1000}){1000}"},
        {"regex": "(SECRETSECRETSECRETSECRETSECRETSECRETSECRETSECRETSECRETSECRETSECRETSECRET"},
    ],
    ids=lambda form: str(form)[:40],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_form_without_meaning_is_refused_before_a_stream_begins(
    client: openai.OpenAI, form: dict[str, Any], stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(
            model=MODEL, prompt="x", stream=stream, extra_body={"structured_outputs": form}
        )
    assert bad.value.param == "response_format"
    assert "SECRET" * 11 not in str(bad.value)
