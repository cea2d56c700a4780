"""What asks for nothing is accepted; what asks for something that is not there is refused."""

import json
import time
from typing import Any

import pytest

from actors.openai import chat_template
from actors.openai.errors import ApiError
from actors.openai.protocol import parse_body
from actors.openai.request_adapter import build_requests
from tests.support.gateway import MODEL, served, serving, tokenizer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": "import os", "max_tokens": 6, "seed": 1}
CONVERSATION: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 6,
    "seed": 1,
}
# A template in the manner of Qwen's: it knows tools and their calls.
TOOLS = (
    "{% for m in messages %}{% if m.role == 'tool' %}<result {{ m.tool_call_id }}>{{ m.content }}"
    "{% else %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}{% endif %};"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def meaning(url: str, body: dict[str, Any]) -> Any:
    parsed, ignored = parse_body(url, body)
    assert not ignored
    return build_requests(parsed, served(), "s", 0)


EITHER: list[dict[str, Any]] = [
    {"best_of": 1},
    {"best_of": 3, "n": 3},
    {"tools": [], "tool_choice": "none"},
    {"tool_choice": "auto", "parallel_tool_calls": True},
    {"functions": [], "function_call": "none"},
    {"stream_options": {}},
    {"stream_options": {"include_usage": False, "include_obfuscation": False}},
    {"stream_options": {"include_usage": None, "continuous_usage_stats": None}},
    {"response_format": {"type": "text", "json_schema": None, "regex": None}},
    {"speculative": {"enabled": None, "max_rows": None}},
    {"structured_outputs": {"json": None, "regex": None}},
    {"logit_bias": {"5": None}},
    {"skip_special_tokens": True, "length_penalty": 1, "use_beam_search": False},
    {"chat_template_kwargs": {}},
]


@pytest.mark.parametrize(
    ("url", "fields"),
    [
        *((url, fields) for url in (COMPLETIONS, CHAT) for fields in EITHER),
        (CHAT, {"modalities": ["text"], "add_generation_prompt": True, "echo": False}),
        (COMPLETIONS, {"suffix": "", "add_special_tokens": True, "echo": None}),
    ],
    ids=str,
)
def test_a_request_is_the_same_with_fields_that_ask_for_nothing(
    url: str, fields: dict[str, Any]
) -> None:
    plain = COMPLETION if url == COMPLETIONS else CONVERSATION
    plain = plain | {"n": fields.get("n", 1)}
    assert meaning(url, {**plain, **fields}) == meaning(url, plain)


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "text"},
        {"type": "message", "annotations": [], "tool_calls": []},
        {"refusal": None, "audio": None, "function_call": None, "tool_calls": None},
        {"content": [{"type": "text", "text": "hello", "image_url": None}]},
    ],
    ids=str,
)
def test_a_message_is_the_same_with_fields_that_ask_for_nothing(fields: dict[str, Any]) -> None:
    message = {"role": "assistant", "content": "hello"}
    plain, more = (
        meaning(CHAT, {**CONVERSATION, "messages": [one]}) for one in (message, message | fields)
    )
    assert plain == more


@pytest.mark.parametrize(
    ("url", "fields", "name"),
    [
        (CHAT, {"tools": [{"type": "function"}]}, "tools"),
        (CHAT, {"tool_choice": "required"}, "tool_choice"),
        (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
        (CHAT, {"echo": True}, "echo"),
        (CHAT, {"priority": False}, "priority"),
        (CHAT, {"parallel_tool_calls": 1}, "parallel_tool_calls"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "type": "file"}]}, "messages.0.type"),
        (COMPLETIONS, {"suffix": "x"}, "suffix"),
        (COMPLETIONS, {"stop_token_ids": [3]}, "stop_token_ids"),
        (COMPLETIONS, {"stream_options": {"more": False}}, "stream_options.more"),
    ],
    ids=str,
)
def test_what_asks_for_something_is_refused_by_name(
    url: str, fields: dict[str, Any], name: str
) -> None:
    with pytest.raises(ApiError) as refused:
        parse_body(url, {**(COMPLETION if url == COMPLETIONS else CONVERSATION), **fields})
    assert (refused.value.code, refused.value.param) == ("unknown_field", name)


def test_null_is_a_value_in_what_clients_define() -> None:
    schema = {"enum": [None, 1], "default": None, "properties": {"a": {"const": None}}}
    form = {"type": "json_schema", "json_schema": {"name": "a", "strict": None, "schema": schema}}
    body, _ = parse_body(COMPLETIONS, {**COMPLETION, "response_format": form})
    assert body.response_format is not None
    assert body.response_format.json_schema is not None
    assert body.response_format.json_schema.schema_ == schema


def prompt_of(messages: list[dict[str, Any]], template: str = TOOLS) -> str:
    model = served(template)
    body, _ = parse_body(CHAT, {**CONVERSATION, "messages": messages})
    return str(model.tokenizer.decode(build_requests(body, model, "s", 0)[0].prompt))


def test_tools_are_rendered_by_a_template_that_knows_them() -> None:
    history: list[dict[str, Any]] = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "2"}]},
    ]
    assert prompt_of(history) == (
        '<user>1 + 1?;<assistant><call>add {"a": 1};<result c1>2;<assistant>'
    )
    with pytest.raises(ApiError, match=r"messages.2: role tool is not supported"):
        prompt_of([*history[:1], {"role": "user", "content": "x"}, history[2]], "{{ messages }}")
    with pytest.raises(ApiError, match=r"messages.1.tool_calls is not supported"):
        prompt_of(history[:2], "{% if m.role == 'tool' %}{{ messages }}{% endif %}")


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"function": {"arguments": "{}"}},
        {"function": {"name": "a", "arguments": "{"}},
        {"function": {"name": "a", "arguments": "[" * 20}},
        {"function": {"name": "a", "arguments": [1]}},
    ],
    ids=str,
)
def test_calls_of_tools_are_checked(call: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match=r"messages.0.tool_calls is not allowed") as refused:
        prompt_of([{"role": "assistant", "content": "x", "tool_calls": [call]}])
    assert refused.value.param == "messages"


def test_a_message_without_content_is_refused() -> None:
    with pytest.raises(ApiError, match=r"messages.0.content is missing") as refused:
        prompt_of([{"role": "assistant"}])
    assert refused.value.code == "missing_field"


def test_developers_are_systems_to_a_template_that_does_not_know_them() -> None:
    messages = [{"role": "developer", "content": "Be brief."}]
    assert prompt_of(messages) == "<system>Be brief.;<assistant>"
    known = TOOLS.replace("'tool'", "'tool' or m.role == 'developer' and false")
    assert prompt_of(messages, known) == "<developer>Be brief.;<assistant>"


def test_a_machine_that_is_busy_refuses_no_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what the template computes counts, not that it has to wait for the processor."""
    found, render = tokenizer(), tokenizer().apply_chat_template

    def wait(*given: Any, **options: Any) -> Any:
        time.sleep(0.3)
        return render(*given, **options)

    monkeypatch.setattr(chat_template, "RENDER_TIMEOUT_S", 0.2)
    monkeypatch.setattr(found, "apply_chat_template", wait)
    messages = [{"role": "user", "content": "hello"}]
    assert chat_template.render(found, messages) == "<user>hello\n<assistant>"


def test_streams_have_usage_so_far_and_equal_sizes_if_asked_for() -> None:
    options = {
        "include_usage": True,
        "include_obfuscation": True,
        "continuous_usage_stats": True,
    }
    body = {**COMPLETION, "max_tokens": 12, "stream": True, "stream_options": options}
    with serving() as gateway, gateway.http() as http:
        lines = http.post(COMPLETIONS, json=body).content.split(b"\n\n")[:-2]
    events = [json.loads(line.removeprefix(b"data: ")) for line in lines]
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert len(events) > 3
    assert counts == sorted(counts)
    assert (counts[-1], events[-1]["choices"]) == (12, [])
    texts = [event["choices"][0]["text"] for event in events[:-1]]
    assert len({*map(len, texts)}) > 1
    assert len({len(line) % 64 for line in lines[:-1]}) == 1
