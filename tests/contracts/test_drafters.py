"""Every drafting method keeps the target's output, is bounded, and forgets closed sessions."""

import asyncio

import numpy as np
import pytest

from runtime.core import limits
from runtime.core.messages import Draft, Open, Reply, Share
from runtime.core.node_keys import text_key
from runtime.core.sampling_params import SamplingParams
from runtime.draft.draft_engine import DraftEngine
from runtime.draft.draft_state import MAX_UNVERIFIED_NODES
from runtime.draft.frontier import Frontier
from runtime.drafters.base import ExpandRequest
from runtime.schedulers.fixed import Fixed
from tests.support.drafters import LOOPING, METHODS, PROMPT, built, expanded, holds, near, text_of
from tests.support.harness import Lockstep, answer, asking, engine_of, hosted, plain, running


@METHODS
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_output_is_the_targets(method: str, temperature: float) -> None:
    request = asking(PROMPT, max_tokens=60, temperature=temperature, seed=4)
    lockstep = Lockstep(engine_of(LOOPING), DraftEngine(built(method), "d", 4))
    (drafted,) = lockstep.run(request)
    assert drafted.said() == plain(LOOPING, request).said()
    assert drafted.stats.accepted > 0


@METHODS
def test_the_output_is_the_targets_through_a_link(method: str) -> None:
    request = asking(PROMPT, max_tokens=40)

    async def main() -> None:
        async with (
            running(LOOPING, Fixed(8, 0.005)) as target,
            hosted(built(method), width=4) as host,
        ):
            target.attach("d", host)
            assert (await answer(target, request)).said() == plain(LOOPING, request).said()

    asyncio.run(main())


@METHODS
@pytest.mark.parametrize("width", [1, 4, 64])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replies_are_bounded_and_make_sense(method: str, width: int, temperature: float) -> None:
    """Without commits a drafter falls silent; a target accepts each of its messages."""
    sent: list[Reply] = []
    draft_engine = DraftEngine(built(method), "d", width)
    sampling = SamplingParams(max_tokens=400, temperature=temperature, top_k=3)
    draft_engine.handle(
        0, Open("s", 0, tuple(PROMPT), len(PROMPT), sampling, Share("s", 0, 1)), sent.append
    )
    passes = 0
    while draft_engine.step():
        passes += 1
        assert passes <= MAX_UNVERIFIED_NODES + limits.TREE_DEPTH
    known = {text_key(PROMPT)}
    assert draft_engine.counters == {}
    for reply in sent:
        assert isinstance(reply, Draft)
        assert (
            0 < len(reply.parents) == len(reply.tokens) == len(reply.scores) <= limits.DRAFT_NODES
        )
        assert np.isfinite(reply.scores).all()
        assert (reply.scores <= 0.0).all()
        assert ((reply.tokens >= 0) & (reply.tokens < LOOPING.vocabulary)).all()
        for parent, token in zip(reply.parents.tolist(), reply.tokens.tolist(), strict=True):
            assert parent in known
            known.add(text_key([token], parent))
    assert len(known) <= limits.TREE_NODES


@METHODS
def test_children_are_of_the_leaves_that_were_asked_about(method: str) -> None:
    drafter, text = built(method), text_of(PROMPT)
    first = expanded(drafter, text, [0])
    assert set(first.parents.tolist()) <= {0}
    for token, score in zip(first.tokens.tolist(), first.scores.tolist(), strict=True):
        text.tree.add(0, token, score)
    leaves = list(range(1, len(text.tree)))
    second = expanded(drafter, text, leaves)
    assert set(second.parents.tolist()) <= set(leaves)
    assert [str(array.dtype) for array in (second.parents, second.tokens, second.scores)] == [
        "int32",
        "int32",
        "float32",
    ]


@METHODS
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_sessions_do_not_show_in_each_other(method: str, temperature: float) -> None:
    """Asked about together, in any order, each gets what it would get alone."""
    texts = {
        name: text_of([*PROMPT, *more], name, temperature=temperature)
        for name, more in (("a", [7]), ("b", [1, 5, 9]), ("c", []))
    }
    together, alone = built(method), {name: built(method) for name in texts}
    for names in (["a", "b"], ["b", "c", "a"], ["c", "a"]):
        requests = [
            ExpandRequest(texts[name], Frontier(texts[name].tree, 20, -50.0).best(3))
            for name in names
        ]
        for request, reply in zip(requests, together.expand(requests), strict=True):
            text = request.text
            expected = expanded(alone[text.session], text, request.leaves)
            assert reply is not None
            found = near(reply)
            assert (found.parents.tolist(), found.tokens.tolist()) == (
                expected.parents.tolist(),
                expected.tokens.tolist(),
            )
            assert np.allclose(found.scores, expected.scores, atol=1e-5)
            for leaf in request.leaves:
                text.tree.expanded[leaf] = True
            for parent, token, score in zip(
                found.parents.tolist(), found.tokens.tolist(), found.scores.tolist(), strict=True
            ):
                text.tree.add(parent, token, score)


@METHODS
def test_nothing_is_left_of_a_closed_session(method: str) -> None:
    drafter = built(method)
    for session in ("session-one", "session-two"):
        expanded(drafter, text_of(PROMPT, session), [0])
    drafter.close("session-one")
    drafter.close("session-one")
    drafter.close("session-never-seen")
    assert not holds(drafter, "session-one")
    again = expanded(drafter, text_of([*PROMPT, 7, 7], "session-one"), [0])
    fresh = expanded(built(method), text_of([*PROMPT, 7, 7], "session-one"), [0])
    assert again.tokens.tolist() == fresh.tokens.tolist()


def test_what_is_kept_would_be_found() -> None:
    drafter = built("model")
    expanded(drafter, text_of(PROMPT, "session-one"), [0])
    assert holds(drafter, "session-one")
