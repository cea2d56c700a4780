"""A controller that comes back finds its members, or learns that they are lost. Ray is a fake."""

import threading
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RpcError

from actors.controller import actor_handles, controller_state, recorder
from actors.controller.actor_handles import ActorHandle
from actors.controller.controller import Controller
from actors.controller.controller_state import ControllerState
from actors.controller.reconciler import GATEWAY, TARGET, Member, spec_of
from actors.rpc.endpoints import ActorLocation
from runtime.config import Deployment
from runtime.core.errors import Unavailable
from runtime.telemetry.tracing import Recording

PLAN = Deployment.model_validate({"target": {"model": "big", "replicas": 4}})


class Actor:
    """Notes which of its methods are called, and never answers."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, method: str) -> Any:
        if method == "remote":
            raise AttributeError(method)
        return Method(self.asked, method)


class Method:
    def __init__(self, asked: list[str], name: str) -> None:
        self.asked, self.name = asked, name

    def remote(self) -> object:
        self.asked.append(self.name)
        return object()


def member(index: int, **others: Any) -> Member:
    spec = spec_of(PLAN, TARGET, index)
    assert spec is not None
    found = Member(
        f"target-{index}",
        TARGET,
        index,
        2,
        spec,
        "ready",
        0.0,
        ActorLocation(f"10.0.0.1:{index}", 7, "node"),
        placed=True,
    )
    return replace(found, **others)


def resumed(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, Actor | Exception], *members: Member
) -> Controller:
    """Returns a controller that takes over `members`; `answers` are Ray's, by actor name."""

    def get_actor(name: str) -> Actor:
        answer = answers[name]
        if isinstance(answer, Exception):
            raise answer
        return answer

    written = controller_state.encode(
        ControllerState(PLAN, {TARGET: len(members)}, members, {one.name: 3 for one in members}, 5)
    )
    monkeypatch.setattr(
        controller_state, "_internal_kv_get", {controller_state.STATE_KEY: written}.get
    )
    monkeypatch.setattr(ray, "get_actor", get_actor)
    monkeypatch.setattr(Controller, "_watch", lambda self: None)
    return Controller(Deployment.model_validate({"target": {"model": "other"}}), served=True)


def test_it_knows_again_who_is_there_and_who_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    there, starting = Actor(), Actor()
    answers: dict[str, Actor | Exception] = {
        "target-0-2": there,
        "target-1-2": starting,
        "target-2-2": ValueError("Failed to look up actor"),
        "target-3-2": RpcError("Timed out while waiting for GCS\nmore", rpc_code=4),
    }
    found = resumed(
        monkeypatch,
        answers,
        member(0),
        member(1, state="starting", place=None),
        member(2),
        member(3),
    )
    assert (there.asked, starting.asked) == (["report"], ["start", "__ray_ready__"])
    assert (found.deployment, found.members.replaced, found.members.lives["target-3"]) == (
        PLAN,
        5,
        3,
    )
    assert [one.lost for one in found.members.present] == [
        "",
        "",
        "it ended while the controller was away",
        "Ray does not find it: Timed out while waiting for GCS",
    ]


def test_why_a_member_was_lost_before_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    found = resumed(
        monkeypatch, {"target-0-2": GetTimeoutError("no answer")}, member(0, lost="killed")
    )
    assert found.members.by_name["target-0"].lost == "killed"


def test_one_that_is_gone_can_be_drained(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ended: there is nobody left who could finish anything."""
    found, ended = resumed(monkeypatch, {"target-0-2": ValueError("gone")}, member(0)), list[str]()
    monkeypatch.setattr(actor_handles, "kill", lambda one, _: ended.append(one.name))
    found.drain("target-0")
    assert ended == ["target-0"]
    assert not found.members.present


@pytest.mark.parametrize("second_starts", [True, False])
def test_an_apply_that_fails_leaves_a_later_one_in_force(
    monkeypatch: pytest.MonkeyPatch, second_starts: bool
) -> None:
    """The second of two calls at once begins while the first waits, and ends after it."""
    found = resumed(monkeypatch, {})
    first, second = (Deployment.model_validate({"target": {"model": name}}) for name in "ab")
    waiting, failed = threading.Event(), threading.Event()

    def await_ready(timeout_s: float) -> None:
        if found.deployment is first:
            waiting.set()
            assert failed.wait(30.0)
            raise Unavailable("the first does not start")
        failed.set()
        thread.join(30.0)
        assert (found.deployment, found.counts) == (second, {TARGET: 1, GATEWAY: 1})
        if not second_starts:
            raise Unavailable("the second does not start")

    def apply_first() -> None:
        with pytest.raises(Unavailable, match="first"):
            found.apply(first)

    monkeypatch.setattr(found, "_await_ready", await_ready)
    thread = threading.Thread(target=apply_first)
    thread.start()
    assert waiting.wait(30.0)
    with nullcontext() if second_starts else pytest.raises(Unavailable, match="second"):
        found.apply(second)
    assert found.deployment == (second if second_starts else PLAN)


def test_an_apply_that_fails_brings_back_the_deployment_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = resumed(monkeypatch, {})

    def fail(timeout_s: float) -> None:
        raise Unavailable("it does not start")

    monkeypatch.setattr(found, "_await_ready", fail)
    with pytest.raises(Unavailable, match="does not start"):
        found.apply(Deployment.model_validate({"target": {"model": "a"}}))
    assert (found.deployment, found.counts) == (PLAN, {TARGET: 0})


def test_a_lost_member_takes_only_its_own_recording_along(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(answer: Any) -> Any:
        for one in answer if isinstance(answer, list) else [answer]:
            if isinstance(one, Exception):
                raise one
        return answer

    monkeypatch.setattr(ray, "wait", lambda answers, **_: (answers, []))
    monkeypatch.setattr(ray, "get", get)
    kept = Recording("target-0", 0.0, [], False)
    actors = [
        SimpleNamespace(trace=SimpleNamespace(remote=lambda answer=answer: answer))
        for answer in (ActorDiedError(), kept)
    ]
    assert recorder.take_recordings([ActorHandle(actor) for actor in actors]) == [kept]
