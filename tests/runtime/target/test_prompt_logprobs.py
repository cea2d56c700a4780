"""The target scores the tokens of a prompt while it reads it, in chunks of bounded memory."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from runtime.core.errors import InvalidRequest
from runtime.core.messages import Chunk, Logprob
from runtime.core.sampler_reference import logprobs
from runtime.models import sampler
from runtime.models.base import causal
from runtime.models.toy import ToyModel
from runtime.target import chunked_prefill
from runtime.target.target import check
from runtime.target.verifier import Verifier
from tests.runtime.target.test_batching import Desk, Watched
from tests.support.families import FAMILIES, VOCABULARY, hf_model
from tests.support.harness import asking, engine_of

LONG = tuple((7 * place + place**2) % 24 for place in range(150))


def scored(chunks: Sequence[Chunk]) -> tuple[Logprob, ...]:
    """Of all chunks; they come before all tokens."""
    having = [bool(chunk.prompt_logprobs) for chunk in chunks]
    assert not any(chunk.tokens for chunk in chunks[: sum(having)])
    assert having == sorted(having, reverse=True)
    return tuple(logprob for chunk in chunks for logprob in chunk.prompt_logprobs)


def expected(model: ToyModel, prompt: Sequence[int], k: int) -> tuple[Logprob, ...]:
    logits = model.forward(model.new_cache(), causal(np.asarray(prompt[:-1], dtype=np.int64), 0))
    return logprobs(logits, prompt[1:], k)


@pytest.mark.parametrize("most", [1, 24 * 40, 1 << 24], ids=["row", "rows", "all"])
def test_each_token_of_the_prompt_but_the_first_has_its_logprob(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(chunked_prefill, "MAX_LOGITS", most)
    model = Watched()
    desk = Desk(engine_of(model))
    plain = asking(LONG, "plain")
    wanted = asking(LONG, "scored", prompt_logprobs=2)
    desk.admit(plain)
    usual = desk.run()["plain"]
    model.passes.clear()
    desk.admit(wanted)
    found = desk.run()["scored"]
    assert max(map(max, model.passes)) <= max(1, most // 24, 9)
    assert found.said() == usual.said()
    assert found.stats.reused == 0, "what is copied has no logits"
    assert scored(desk.chunks["scored"]) == expected(model, LONG, 2)


def test_only_reading_a_prompt_takes_no_step() -> None:
    model = Watched()
    desk = Desk(engine_of(model))
    full = tuple((LONG * 4)[: model.context])
    asked = {
        "long": asking(LONG, "long", max_tokens=0, prompt_logprobs=0),
        "same": asking(LONG, "same", max_tokens=0, prompt_logprobs=3),
        "full": asking(full, "full", max_tokens=0, prompt_logprobs=1),
        "one": asking(LONG[:1], "one", max_tokens=0, prompt_logprobs=1),
    }
    for request in asked.values():
        check(request, model.vocabulary, model.context)
        desk.admit(request)
    while desk.engine.requests.running:
        desk.engine.step()
    for name, request in asked.items():
        chunks, k = desk.chunks[name], request.sampling.prompt_logprobs
        assert k is not None
        assert scored(chunks) == expected(model, request.prompt, k)
        last = chunks[-1]
        assert (last.tokens, last.finish_reason) == ((), "length")
        assert last.stats is not None
        assert (last.stats.rounds, last.stats.completion_tokens) == (0, 0)
    assert desk.engine.requests.idle
    assert desk.engine.requests.admission.reserved == 0
    with pytest.raises(InvalidRequest, match="shorten the prompt"):
        check(replace(asked["full"], prompt=(*full, 1)), model.vocabulary, model.context)


def test_sessions_beside_it_go_on_and_a_resumed_one_is_scored_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunked_prefill, "MAX_LOGITS", 24 * 16)
    model = ToyModel(vocabulary=24, memory=3, context=600)
    desk = Desk(engine_of(model))
    others = [asking((place, *LONG), f"other{place}") for place in range(3)]
    whole = asking(LONG, "whole", prompt_logprobs=1)
    for request in (*others[:2], whole, others[2]):
        desk.admit(request)
    said = desk.run()
    for request in others:
        alone = Desk(engine_of(model))
        alone.admit(request)
        assert alone.run()[request.session].said() == said[request.session].said()
    resumed = Desk(engine_of(model))
    resumed.admit(replace(whole, committed=said["whole"].tokens[:9], epoch=1))
    assert resumed.run()["whole"].tokens == said["whole"].tokens[9:]
    assert scored(resumed.chunks["whole"]) == scored(desk.chunks["whole"])
    assert scored(desk.chunks["whole"]) == expected(model, LONG, 1)


def test_a_score_that_fails_ends_its_session_alone() -> None:
    def failing(logits: Any, tokens: Sequence[int], k: int) -> tuple[Logprob, ...]:
        if k == 7:
            raise RuntimeError("no room")
        return logprobs(logits, tokens, k)

    model = ToyModel(vocabulary=24, memory=3, context=600)
    engine = engine_of(model)
    engine.runner.verifier = Verifier(engine.runner.verifier.sample, frozenset(), failing)
    desk = Desk(engine)
    bad, good = (asking(LONG, f"k{k}", prompt_logprobs=k) for k in (7, 2))
    for request in (bad, good):
        desk.admit(request)
    said = desk.run()
    assert (said["k7"].reason, said["k7"].tokens) == ("error", ())
    assert scored(desk.chunks["k2"]) == expected(model, LONG, 2)
    assert said["k2"].reason == "length"


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2-sliding"])
def test_they_are_those_of_transformers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_prefill, "MAX_LOGITS", VOCABULARY * 11)
    module = FAMILIES[family]()
    prompt = tuple((5 * place + place**2) % VOCABULARY for place in range(40))
    with torch.inference_mode():
        logs = module(torch.tensor([prompt])).logits[0].log_softmax(dim=-1)
    engine = engine_of(hf_model(family), chooser=sampler.choose)
    engine.runner.verifier = Verifier(sampler.choose, frozenset(), sampler.logprobs)
    desk = Desk(engine)
    desk.admit(asking(prompt, max_tokens=1, prompt_logprobs=3))
    desk.run()
    found = scored(desk.chunks["s"])
    assert [one.chosen for one in found] == pytest.approx(
        logs[range(39), prompt[1:]].tolist(), abs=1e-3
    )
    assert [one.top[0][0] for one in found] == logs[:-1].argmax(-1).tolist()
