"""Every drafting method in the folder: right through a target, bounded, forgetful. And each of ours in particular."""

import asyncio
import gc
import importlib
import types
from collections.abc import Sequence
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import limits
from runtime.choice import Ask
from runtime.config import methods
from runtime.drafters.base import Children, Drafter, Ingredients, Text
from runtime.drafters.model import ModelDrafter
from runtime.drafters.ngram import LONGEST, SHORTEST, Ngram, lookup
from runtime.drafters.noisy import Noisy
from runtime.frontier import frontier
from runtime.grower import RUN_AHEAD, Grower
from runtime.messages import Close, Draft, Open, Reply, Request, Share
from runtime.models.choose import candidates
from runtime.models.toy import ToyModel
from runtime.sampling import Sampling
from runtime.schedulers.fixed import Fixed
from runtime.tree import TokenTree, text_key
from tests.rig import Lockstep, answer, asking, engine_of, hosted, plain, running
from tests.rig import children as guesses

PROMPT = [3, 1, 4, 1, 5, 9, 3, 1, 4, 1]
LOOPING = ToyModel(vocabulary=16, memory=2)  # its greedy output repeats itself: something for every method to find
METHODS = pytest.mark.parametrize("method", methods())


def built(method: str) -> Drafter:
    module = importlib.import_module(f"runtime.drafters.{method}")
    drafter: Drafter = module.build(Ingredients("target", "draft", lambda name: LOOPING))
    return drafter


def text_of(tokens: Sequence[int], session: str = "s", **sampling: object) -> Text:
    tree = TokenTree(text_key(tokens), tokens[-1], limits.TREE_NODES, limits.TREE_DEPTH)
    return Text(session, list(tokens), len(tokens), Sampling(**sampling), tree)  # type: ignore[arg-type]


def holds(thing: object, name: str) -> bool:
    """Whether the name can be reached from the object, by whatever it keeps."""
    seen: set[int] = set()
    stack = [thing]
    while stack:
        found = stack.pop()
        if id(found) in seen or isinstance(found, type | types.ModuleType | types.FunctionType | types.MethodType):
            continue
        seen.add(id(found))
        if isinstance(found, str) and found == name:
            return True
        stack.extend(gc.get_referents(found))
        if isinstance(found, dict):
            stack.extend(found)  # CPython does not follow keys that are strings
    return False


# The contract


@METHODS
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_output_is_the_targets(method: str, temperature: float) -> None:
    request = asking(PROMPT, max_tokens=60, temperature=temperature, seed=4)
    lockstep = Lockstep(engine_of(LOOPING), Grower(built(method), "d", 4))
    (drafted,) = lockstep.run(request)
    assert drafted.said() == plain(LOOPING, request).said()
    assert drafted.stats.accepted > 0


@METHODS
def test_the_output_is_the_targets_through_a_link(method: str) -> None:
    request = asking(PROMPT, max_tokens=40)

    async def main() -> None:
        async with running(LOOPING, Fixed(8, 0.005)) as target, hosted(built(method), width=4) as host:
            target.attach("d", host)
            assert (await answer(target, request)).said() == plain(LOOPING, request).said()

    asyncio.run(main())


@METHODS
@pytest.mark.parametrize("width", [1, 4, 64])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replies_are_bounded_and_make_sense(method: str, width: int, temperature: float) -> None:
    """As long as nobody commits, a drafter falls silent; each of its messages is one that a target takes."""
    sent: list[Reply] = []
    grower = Grower(built(method), "d", width)
    sampling = Sampling(max_tokens=400, temperature=temperature, top_k=3)
    grower.hear((0, "s"), Open("s", 0, tuple(PROMPT), len(PROMPT), sampling, Share("s", 0, 1)), sent.append)
    passes = 0
    while grower.grow((0, "s")):
        passes += 1
        assert passes <= RUN_AHEAD + limits.TREE_DEPTH
    known = {text_key(PROMPT)}
    assert grower.counters == {}
    for reply in sent:
        assert isinstance(reply, Draft)
        assert 0 < len(reply.parents) == len(reply.tokens) == len(reply.scores) <= limits.DRAFT_NODES
        assert set(reply.parents.tolist()) <= known
        assert np.isfinite(reply.scores).all()
        assert (reply.scores <= 0.0).all()
        assert ((reply.tokens >= 0) & (reply.tokens < LOOPING.vocabulary)).all()
        known.update(text_key([token], parent) for parent, token in zip(reply.parents.tolist(), reply.tokens.tolist(), strict=True))
    assert len(known) <= limits.TREE_NODES


@METHODS
def test_children_are_of_the_leaves_that_were_asked_about(method: str) -> None:
    drafter, text = built(method), text_of(PROMPT)
    first = drafter.expand(text, [0])
    assert set(first.parents.tolist()) <= {0}
    for token, score in zip(first.tokens.tolist(), first.scores.tolist(), strict=True):
        text.tree.add(0, token, score)
    leaves = list(range(1, len(text.tree)))
    second = drafter.expand(text, leaves)
    assert set(second.parents.tolist()) <= set(leaves)
    assert [str(array.dtype) for array in (second.parents, second.tokens, second.scores)] == ["int32", "int32", "float32"]


@METHODS
def test_nothing_is_left_of_a_closed_session(method: str) -> None:
    drafter = built(method)
    for session in ("session-one", "session-two"):
        drafter.expand(text_of(PROMPT, session), [0])
    drafter.close("session-one")
    drafter.close("session-one")
    drafter.close("session-never-seen")
    assert not holds(drafter, "session-one")
    again = drafter.expand(text_of([*PROMPT, 7, 7], "session-one"), [0])
    fresh = built(method).expand(text_of([*PROMPT, 7, 7], "session-one"), [0])
    assert again.tokens.tolist() == fresh.tokens.tolist()


def test_what_is_kept_would_be_found() -> None:
    drafter = built("model")
    drafter.expand(text_of(PROMPT, "session-one"), [0])
    assert holds(drafter, "session-one")


# A model


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 2)), max_size=10),
    st.integers(0, 999),
    st.sampled_from([0.0, 0.9]),
)
@settings(max_examples=60)
def test_its_cache_never_shows(history: list[tuple[int, int, int]], seed: int, temperature: float) -> None:
    """After any growth and commits, each guess is what the model says of that very text. The toy checks all positions."""
    model, random = ToyModel(vocabulary=12), Random(seed)
    drafter, text = ModelDrafter(model, branches=2), text_of(PROMPT, temperature=temperature)
    tree, tokens = text.tree, text.tokens
    assert isinstance(tokens, list)
    for passes, known, unknown in [*history, (1, 0, 0)]:
        for _ in range(passes):
            leaves = frontier(tree, random.randint(1, 4), 0, 1, 20, -50.0)
            found = drafter.expand(text, leaves)
            assert sorted(set(found.parents.tolist())) == sorted(leaves)
            for leaf in leaves:
                path = [*tokens, *tree.tokens_to(leaf)]
                expected, _ = candidates(
                    torch.as_tensor(model.logits(path))[None], Ask(text.sampling, text.prompt, path, [[]], frozenset()), 2
                )
                assert found.tokens[found.parents == leaf].tolist() == expected[0].tolist()
                tree.expanded[leaf] = True
            for parent, token, score in zip(found.parents.tolist(), found.tokens.tolist(), found.scores.tolist(), strict=True):
                tree.add(parent, token, score)
            assert drafter.kept["s"].cache.length <= len(tokens) + len(tree)
        decided, node = [], 0
        for _ in range(known):
            if tree.children[node]:
                token, node = random.choice(list(tree.children[node].items()))
                decided.append(token)
        decided += [random.randrange(12) for _ in range(unknown)]
        if decided:
            tree.reroot(decided)
            tokens.extend(decided)


def test_after_a_hit_nothing_is_computed_twice() -> None:
    """Commits along its own guesses: every token of the text and of the tree goes through the model once."""

    class Counting(ToyModel):
        rows = 0

        def forward(self, cache, rows, last=None):  # type: ignore[no-untyped-def]
            self.rows += len(rows.tokens)
            return super().forward(cache, rows, last)

    model = Counting(vocabulary=12)
    drafter, text = ModelDrafter(model, branches=1), text_of(PROMPT)
    tokens = text.tokens
    assert isinstance(tokens, list)
    for _ in range(12):
        (leaf,) = frontier(text.tree, 1, 0, 1, 20, -1e9)
        found = drafter.expand(text, [leaf])
        text.tree.expanded[leaf] = True
        text.tree.add(leaf, int(found.tokens[0]), -0.1)
        if len(text.tree) > 4:
            decided = text.tree.tokens_to(2)
            text.tree.reroot(decided)
            tokens.extend(decided)
    assert model.rows == len(PROMPT) + 11


def test_what_the_filters_bar_is_not_proposed() -> None:
    found = ModelDrafter(LOOPING, branches=4).expand(text_of(PROMPT, temperature=1.0, top_k=1), [0])
    assert found.tokens.tolist() == [int(LOOPING.logits(PROMPT).argmax())]
    assert found.scores.tolist() == [0.0]


def test_it_is_silent_beyond_its_own_context() -> None:
    small = ToyModel(vocabulary=16, memory=2, context=16)
    drafter = ModelDrafter(small)
    assert len(drafter.expand(text_of(PROMPT + [1] * 6), [0]).tokens) > 0
    assert len(drafter.expand(text_of(PROMPT + [1] * 7), [0]).tokens) == 0
    request = asking(PROMPT, max_tokens=40)
    (drafted,) = Lockstep(engine_of(LOOPING), Grower(ModelDrafter(small), "d")).run(request)
    assert drafted.said() == plain(LOOPING, request).said()
    assert 0 < drafted.stats.accepted < 10


# N-grams


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([1, 2, 3, 9, 1, 2, 3], (9, 3)),
        ([1, 2, 7, 5, 1, 2, 8, 0, 1, 2], (8, 2)),  # the latest place of those that agree in as much
        ([5, 1, 2, 7, 0, 1, 2, 8, 5, 1, 2], (7, 3)),  # more agreement before a later place
        ([4, 4, 4, 4, 4, 4], (4, LONGEST)),
        ([4, 4, 4], (4, SHORTEST)),
        ([1, 2, 3], None),
        ([2, 1, 3, 1], None),  # one token is no evidence
        ([7], None),
        ([], None),
    ],
)
def test_lookup(tokens: list[int], found: tuple[int, int] | None) -> None:
    assert lookup(tokens) == found


@given(st.lists(st.integers(0, 2), max_size=40))
def test_lookup_is_the_longest_and_latest(tokens: list[int]) -> None:
    for length in range(LONGEST, SHORTEST - 1, -1):
        places = [i for i in range(len(tokens) - length) if tokens[i : i + length] == tokens[len(tokens) - length :]]
        if places and length < len(tokens):
            assert lookup(tokens) == (tokens[places[-1] + length], length)
            return
    assert lookup(tokens) is None


def test_ngrams_look_along_the_tree() -> None:
    text = text_of([1, 2, 3, 4, 5, 1, 2])
    drafter, leaf, written = Ngram(), 0, []
    for _ in range(4):
        found = drafter.expand(text, [leaf])
        written.append(int(found.tokens[0]))
        added = text.tree.add(leaf, written[-1], float(found.scores[0]))
        assert added is not None
        leaf = added
    assert written == [3, 4, 5, 1]


# Noise


class Same:
    """Says one token, whatever it is asked."""

    def __init__(self) -> None:
        self.closed: list[str] = []

    def expand(self, text: Text, leaves: Sequence[int]) -> Children:
        return guesses([(leaf, 31, -0.5) for leaf in leaves])

    def close(self, session: str) -> None:
        self.closed.append(session)


@pytest.mark.parametrize(("wrong", "low", "high"), [(0.0, 0, 0), (0.3, 90, 150), (1.0, 400, 400)])
def test_a_share_of_the_guesses_is_spoilt_the_same_in_every_run(wrong: float, low: int, high: int) -> None:
    text = text_of(PROMPT)
    for token in range(400):
        text.tree.add(0, token, -0.5)
    leaves = list(range(1, 401))
    inner = Same()
    noisy = Noisy(inner, 32, wrong)
    found = noisy.expand(text, leaves)
    spoilt = found.tokens != 31
    assert low <= spoilt.sum() <= high
    assert set(found.tokens[spoilt].tolist()) <= {0}
    assert np.array_equal(found.parents, leaves)
    assert np.array_equal(found.tokens, Noisy(Same(), 32, wrong).expand(text, leaves).tokens)
    noisy.close("s")
    assert inner.closed == ["s"]


def test_the_sessions_of_a_request_are_closed_at_the_drafter() -> None:
    inner = Same()
    grower = Grower(inner, "d")
    Lockstep(engine_of(LOOPING), grower).run(Request("x", tuple(PROMPT), Sampling(max_tokens=4)))
    assert inner.closed == ["0/x"]
    grower.hear((0, "x"), Close("x"), lambda reply: None)
    assert inner.closed == ["0/x"]
    assert grower.counters == {}
