"""Items asked of targets directly: answers as the gateway's own, and errors that are the item's."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import GetTimeoutError

from actors.fleet import client
from actors.fleet.fleet_state import Fleet, TargetState
from actors.jobs import cluster_answerer
from actors.jobs.cluster_answerer import ClusterAnswerer
from actors.jobs.items import Answer, Item
from runtime.config import LimitsConfig
from runtime.core.errors import InvalidRequest, OutriderError, Overloaded, TargetsLost, Unavailable
from runtime.core.messages import Chunk, Logprob, Request
from tests.support.gateway import MODEL, Scripted, served

Speak = Callable[[Request], AsyncGenerator[Chunk, None]]


def item(url: str = "/v1/completions", **changes: Any) -> Item:
    prompt = (
        {"prompt": "a"}
        if url == "/v1/completions"
        else {"messages": [{"role": "user", "content": "a"}]}
    )
    return Item(
        1, "one", url, {"model": MODEL, "seed": 5, "max_tokens": 2, **prompt} | changes, "key"
    )


async def two(request: Request) -> AsyncGenerator[Chunk, None]:
    yield Chunk(("x",), (7,), ("d",))
    yield Chunk((f"{request.sampling.seed}",), (8,), ("",), "length")


def failing(error: OutriderError) -> Speak:
    async def speak(request: Request) -> AsyncGenerator[Chunk, None]:
        yield Chunk(("x",), (7,), ("",))
        raise error

    return speak


def ending(reason: Any) -> Speak:
    async def speak(request: Request) -> AsyncGenerator[Chunk, None]:
        yield Chunk(("x",), (7,), ("",), reason)

    return speak


def asked(speak: Speak, one: Item) -> tuple[Answer, Scripted]:
    body = Scripted(speak)
    try:
        return asyncio.run(ClusterAnswerer(body, served(), lambda: 12.0).answer(one)), body
    finally:
        assert body.open == 0


def test_a_completion_is_answered_as_by_the_gateway() -> None:
    found, body = asked(two, item(n=2))
    assert (found.status, found.tokens) == (200, 4)
    assert [choice["text"] for choice in found.body["choices"]] == ["x5", "x6"]
    assert (found.body["object"], found.body["created"], found.body["model"]) == (
        "text_completion",
        12,
        MODEL,
    )
    assert found.body["id"] == f"cmpl-{found.request_id}"
    assert [request.sampling.seed for request in body.asked] == [5, 6]
    assert len({request.session for request in body.asked}) == 2


async def reading(request: Request) -> AsyncGenerator[Chunk, None]:
    scored = tuple(Logprob(-float(token)) for token in request.prompt[1:])
    assert (request.sampling.max_tokens, request.speculation) == (0, False)
    yield Chunk((), (), (), prompt_logprobs=scored[:1])
    yield Chunk((), (), (), prompt_logprobs=scored[1:])
    yield Chunk((), (), (), "length")


def test_a_prompt_is_scored_as_by_the_gateway() -> None:
    changes: dict[str, Any] = {
        "prompt": [[1, 2, 3], [4, 5]],
        "echo": True,
        "logprobs": 0,
        "max_tokens": 0,
    }
    found, _ = asked(reading, item(**changes))
    scores = [choice["logprobs"]["token_logprobs"] for choice in found.body["choices"]]
    assert scores == [[None, -2.0, -3.0], [None, -5.0]]
    assert found.body["usage"]["prompt_tokens"] == found.body["usage"]["total_tokens"] == 5


def test_limits_of_the_deployment_hold_for_items() -> None:
    answerer = ClusterAnswerer(Scripted(two), served(), limits=LimitsConfig(choices=2, prompts=3))
    for one, param in (item(n=3), "n"), (item(prompt=["a"] * 4), "prompt"):
        found = asyncio.run(answerer.answer(one))
        assert (found.status, found.body["error"]["param"]) == (400, param)


def test_a_chat_is_answered_as_by_the_gateway() -> None:
    found, _ = asked(two, item("/v1/chat/completions"))
    assert found.body["choices"][0]["message"] == {"role": "assistant", "content": "x5"}
    assert found.body["object"] == "chat.completion"


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"max_tokens": 0}, 400, "invalid_value"),
        ({"nonsense": 1}, 400, "unknown_field"),
        ({"model": "another"}, 404, "model_not_found"),
        ({"max_tokens": 100_000}, 400, "context_length_exceeded"),
        ({"temperature": -1.0}, 400, "invalid_value"),
        ({"prompt": None}, 400, "missing_field"),
        ({"prompt": [5_000_000]}, 400, "invalid_value"),
    ],
)
def test_what_is_wrong_with_a_body_is_the_items_answer(
    changes: dict[str, Any], status: int, code: str
) -> None:
    found, body = asked(two, item(**changes))
    assert (found.status, found.body["error"]["code"]) == (status, code)
    assert not body.asked


@pytest.mark.parametrize(("reason", "status"), [("deadline", 504), ("error", 500)])
def test_an_end_that_is_none_is_the_items_answer(reason: str, status: int) -> None:
    assert asked(ending(reason), item())[0].status == status


def test_what_a_target_finds_wrong_is_the_items_answer() -> None:
    found, _ = asked(failing(InvalidRequest("the schema is no schema", "response_format")), item())
    assert found.status == 400
    assert found.body["error"]["param"] == "response_format"


def test_an_item_that_may_be_what_ends_targets_is_answered_so() -> None:
    found, _ = asked(failing(TargetsLost("2 targets died")), item())
    assert (found.status, found.body["error"]["code"]) == (500, "targets_lost")


@pytest.mark.parametrize("error", [Overloaded("full"), Unavailable("gone")])
def test_what_may_be_better_later_is_raised(error: OutriderError) -> None:
    with pytest.raises(type(error)):
        asked(failing(error), item(n=2))


def test_targets_of_another_model_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a deployment changes, its fleet has both."""
    old, new = (
        TargetState(name, "a:1", 0, "ready", 0, None, "node", model=name) for name in ("old", "new")
    )
    monkeypatch.setattr(
        client, "ask_controller", lambda what: Fleet("new", MODEL, "0", (old, new), (), (), (), 0)
    )

    assert cluster_answerer.poll_targets("old") == [old]


def test_while_the_controller_is_away_nobody_is_thought_to_be_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def late(*_: object, **__: object) -> Fleet:
        raise GetTimeoutError

    monkeypatch.setattr(
        ray, "get_actor", lambda *_, **__: SimpleNamespace(fleet=SimpleNamespace(remote=object))
    )
    monkeypatch.setattr(ray, "get", late)
    with pytest.raises(Unavailable):
        cluster_answerer.poll_targets("old")


def test_a_session_that_a_target_gave_up_is_asked_again() -> None:
    with pytest.raises(Unavailable):
        asked(ending("cancelled"), item())
