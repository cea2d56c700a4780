"""Evaluation clients get log-probabilities of prompts, and many prompts and choices at once."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest

from runtime.config import LimitsConfig
from runtime.core.sampler_reference import logprobs
from runtime.models.base import causal
from tests.support.gateway import CONTEXT, MODEL, Running, serving, tokenizer

COMPLETIONS = "/v1/completions"
PROMPT = "def f(größe):\n    return '𝄞'"


@pytest.fixture(scope="module")
def gateway() -> Iterator[Running]:
    with serving() as running:
        yield running
        running.eventually(running.free)


@pytest.fixture(scope="module")
def client(gateway: Running) -> Iterator[openai.OpenAI]:
    with gateway.openai() as client:
        yield client


def right(gateway: Running, tokens: Sequence[int]) -> list[float]:
    """The log-probability of each token but the first, from one pass of the model."""
    model = gateway.body.engine.model
    logits = model.forward(model.new_cache(), causal(np.asarray(tokens[:-1], dtype=np.int64), 0))
    return [found.chosen for found in logprobs(logits, tokens[1:], 0)]


def streamed(client: openai.OpenAI, body: Any, choices: int = 1) -> list[dict[str, list[Any]]]:
    """What the events of each choice say together."""
    names = ("text", "tokens", "token_logprobs", "top_logprobs", "text_offset")
    found: list[dict[str, list[Any]]] = [{name: [] for name in names} for _ in range(choices)]
    for event in client.completions.create(**body, stream=True):
        for choice in event.choices:
            found[choice.index]["text"] += [choice.text]
            for name in names[1:] if choice.logprobs else ():
                found[choice.index][name] += getattr(choice.logprobs, name)
    return found


@pytest.mark.parametrize("as_ids", [False, True], ids=["text", "ids"])
@pytest.mark.parametrize("most", [0, 1, 9])
def test_an_echo_has_the_logprobs_of_the_prompt(
    gateway: Running, client: openai.OpenAI, most: int, as_ids: bool
) -> None:
    ids = tokenizer().encode(PROMPT)
    plain: Any = {"model": MODEL, "prompt": ids if as_ids else PROMPT, "seed": 3, "logprobs": 2}
    body = {**plain, "max_tokens": most, "echo": True}
    whole = client.completions.create(**body)
    choice = whole.choices[0]
    assert choice.logprobs is not None
    assert choice.finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), most)
    count = len(ids) + most
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert len(getattr(choice.logprobs, name)) == count
    said: Any = choice.logprobs
    assert said.token_logprobs[0] is said.top_logprobs[0] is None
    assert said.token_logprobs[1 : len(ids)] == right(gateway, ids)
    for logprob, top in zip(said.token_logprobs[1:], said.top_logprobs[1:], strict=True):
        assert logprob in top.values()
        assert len(top) in (2, 3)
    assert choice.text.startswith(PROMPT)
    assert said.text_offset == sorted(said.text_offset)
    for word, (start, end) in zip(said.tokens, pairwise(said.text_offset), strict=False):
        assert "\N{REPLACEMENT CHARACTER}" in word or choice.text[start:end] == word
    if most:
        without = client.completions.create(**plain, max_tokens=most).choices[0]
        assert without.logprobs is not None
        assert choice.text == PROMPT + without.text
        assert said.token_logprobs[len(ids) :] == without.logprobs.token_logprobs
        assert said.text_offset[len(ids) :] == [
            len(PROMPT) + offset for offset in without.logprobs.text_offset or ()
        ]
    (events,) = streamed(client, body)
    assert "".join(events.pop("text")) == choice.text
    assert events == said.model_dump(include=set(events))


def test_an_echo_without_logprobs_is_the_prompt_and_the_output(client: openai.OpenAI) -> None:
    body: Any = {"model": MODEL, "prompt": [PROMPT, "x = 1"], "seed": 3, "n": 2}
    plain = client.completions.create(**body, max_tokens=5)
    echo = client.completions.create(**body, max_tokens=5, echo=True)
    prompts = [PROMPT, PROMPT, "x = 1", "x = 1"]
    assert [choice.text for choice in echo.choices] == [
        prompt + choice.text for prompt, choice in zip(prompts, plain.choices, strict=True)
    ]
    assert echo.usage == plain.usage
    assert [choice.logprobs for choice in echo.choices] == [None] * 4
    only = client.completions.create(**body, max_tokens=0, echo=True)
    assert [choice.text for choice in only.choices] == prompts
    assert [choice.logprobs for choice in only.choices] == [None] * 4
    events = streamed(client, {**body, "max_tokens": 5, "echo": True}, 4)
    assert ["".join(event["text"]) for event in events] == [choice.text for choice in echo.choices]


def test_a_prompt_may_fill_the_context_if_nothing_is_asked_after_it(
    gateway: Running, client: openai.OpenAI
) -> None:
    ids = [(7 * place) % 4000 for place in range(CONTEXT)]
    body: Any = {"model": MODEL, "prompt": ids, "echo": True, "logprobs": 0}
    found = client.completions.create(**body, max_tokens=0).choices[0].logprobs
    assert found is not None
    assert (found.token_logprobs or [])[1:] == right(gateway, ids)
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**body, max_tokens=1)
    assert refused.value.code == "context_length_exceeded"


def test_a_prompt_of_one_token_has_no_logprob(client: openai.OpenAI) -> None:
    found = client.completions.create(
        model=MODEL, prompt=[5], echo=True, logprobs=1, max_tokens=0
    ).choices[0]
    assert found.logprobs is not None
    said: Any = found.logprobs
    assert (said.token_logprobs, said.top_logprobs, said.text_offset) == ([None], [None], [0])
    assert found.text == tokenizer().decode([5])


def test_loglikelihoods_as_lm_evaluation_harness_asks_for_them(
    gateway: Running, client: openai.OpenAI
) -> None:
    """Its local-completions model sends batches of context + continuation as token ids, one token
    more to generate, and reads the logprobs of the continuation in between.
    """
    pairs = [
        (tokenizer().encode(context), tokenizer().encode(continuation))
        for context, continuation in (
            ("import", " os"),
            ("def f(x):", "\n    return x"),
            ("größe =", " 1"),
            ("x", " = y"),
        )
    ] * 4
    body = {
        "model": MODEL,
        "prompt": [context + continuation for context, continuation in pairs],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    with gateway.http() as http:
        answer = http.post(COMPLETIONS, json=body).json()
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    for choice, (context, continuation) in zip(choices, pairs, strict=True):
        found = choice["logprobs"]["token_logprobs"][len(context) : -1]
        tops = choice["logprobs"]["top_logprobs"][len(context) : -1]
        assert found == right(gateway, context + continuation)[len(context) - 1 :]
        assert len(found) == len(continuation)
        greedy = all(logprob == max(top.values()) for logprob, top in zip(found, tops, strict=True))
        best = client.completions.create(
            model=MODEL, prompt=context, max_tokens=len(continuation), temperature=0, logprobs=0
        ).choices[0]
        assert best.logprobs is not None
        likely = math.isclose(sum(best.logprobs.token_logprobs or []), sum(found))
        assert greedy == likely


def test_many_prompts_and_choices(gateway: Running, client: openai.OpenAI) -> None:
    prompts = [[place + 1, place + 2] for place in range(100)]
    many = client.completions.create(model=MODEL, prompt=prompts, max_tokens=2, temperature=0)
    assert [choice.index for choice in many.choices] == list(range(100))
    for place in (0, 57, 99):
        one = client.completions.create(
            model=MODEL, prompt=prompts[place], max_tokens=2, temperature=0
        )
        assert many.choices[place].text == one.choices[0].text
    with gateway.http() as http:
        body = {"model": MODEL, "prompt": "x", "n": 128, "max_tokens": 2, "seed": 1}
        texts = [choice["text"] for choice in http.post(COMPLETIONS, json=body).json()["choices"]]
    assert len(texts) == 128
    assert len(set(texts)) > 64


@pytest.mark.parametrize(
    ("fields", "param", "limit"),
    [
        (
            {"prompt": [[1] * 30, [1] * 21]},
            "prompt",
            "51 token ids of prompts are over limits.prompt_ids of this server, 50",
        ),
        (
            {"prompt": [5], "max_tokens": 7, "n": 2, "logprobs": 2},
            "logprobs",
            "42 log-probabilities of all choices are over limits.logprobs of this server, 41",
        ),
        ({"prompt": ["a"] * 4}, "prompt", "limits.prompts of this server, 3"),
        ({"n": 3}, "n", "limits.choices of this server, 2"),
        (
            {"prompt": [[1] * 21] * 2, "echo": True, "logprobs": 1},
            "logprobs",
            "84 log-probabilities of prompts are over limits.prompt_logprobs of this server, 80",
        ),
        (
            {"prompt": ["a"] * 3, "n": 2},
            "n",
            "6 choices of all prompts are over limits.requests of this server, 5",
        ),
    ],
    ids=["prompt_ids", "logprobs", "prompts", "choices", "prompt_logprobs", "together"],
)
def test_limits_have_the_names_of_the_configuration(
    fields: dict[str, Any], param: str, limit: str
) -> None:
    limits = LimitsConfig(
        prompts=3, prompt_ids=50, choices=2, prompt_logprobs=80, logprobs=41, requests=5
    )
    with serving(limits=limits) as gateway, gateway.http() as http:
        answer = http.post(COMPLETIONS, json={"model": MODEL, "prompt": "x", **fields})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
        assert limit in answer.json()["error"]["message"]
        assert within(http, {"prompt": ["a"] * 2, "n": 2})
        assert within(http, {"prompt": [[1] * 20] * 2, "echo": True, "logprobs": 1})


def within(http: httpx.Client, fields: dict[str, Any]) -> bool:
    body = {"model": MODEL, "max_tokens": 1, **fields}
    return bool(http.post(COMPLETIONS, json=body).status_code == 200)


@pytest.mark.parametrize("prompt", [[[5] * 2048] * 64, [5] * 131_072, [[5] * 131_072]])
def test_many_token_ids_are_not_too_complex(client: openai.OpenAI, prompt: Any) -> None:
    """64 prompts of 2,048 ids were; here they are only too long for the toy's context."""
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=1)
    assert refused.value.code == "context_length_exceeded"
