"""Every drafting method in the folder: right through a target, bounded, forgetful. And each of ours in particular."""

import asyncio
import gc
import importlib
import types
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.core import limits
from runtime.core.draft_nodes import DraftNodes
from runtime.core.errors import InvalidRequest
from runtime.core.messages import Commit, Draft, Open, Reply, Share
from runtime.core.node_keys import text_key
from runtime.core.sampler_reference import SamplingInput
from runtime.core.sampling_params import SamplingParams
from runtime.core.tree import TokenTree
from runtime.draft.draft_engine import DraftEngine
from runtime.draft.draft_state import MAX_UNVERIFIED_NODES
from runtime.draft.frontier import Frontier
from runtime.drafters.base import Drafter, ExpandRequest, Text
from runtime.drafters.model import ModelDrafter
from runtime.method_registry import drafting_methods, module_name
from runtime.models.base import PassInput
from runtime.models.sampler import candidates
from runtime.models.toy import ToyModel
from runtime.schedulers.fixed import Fixed
from tests.support import masks
from tests.support.harness import Lockstep, answer, asking, engine_of, hosted, plain, running

PROMPT = [3, 1, 4, 1, 5, 9, 3, 1, 4, 1]
LOOPING = ToyModel(
    vocabulary=16, memory=2
)  # its greedy output repeats itself: something for every method to find
METHODS = pytest.mark.parametrize("method", drafting_methods())


def built(method: str) -> Drafter:
    module = importlib.import_module(f"runtime.drafters.{module_name(method)}")
    found = masks.tiny(
        LOOPING.vocabulary
    )  # a method that reads the target's folder, and what was trained for it, finds one
    given = masks.ingredients(found.target, found.folder)
    drafter: Drafter = module.build(
        replace(given, load=lambda name: LOOPING, load_layers=lambda name: LOOPING)
    )
    return drafter


def text_of(tokens: Sequence[int], session: str = "s", **sampling: object) -> Text:
    tree = TokenTree(text_key(tokens), tokens[-1], limits.TREE_NODES, limits.TREE_DEPTH)
    return Text(session, list(tokens), len(tokens), SamplingParams(**sampling), tree)  # type: ignore[arg-type]


def expanded(drafter: Drafter, text: Text, leaves: Sequence[int], branches: int = 0) -> DraftNodes:
    """The method's answer to one wish, as far as it hangs on the tree."""
    (found,) = drafter.expand([ExpandRequest(text, leaves, branches)])
    assert found is not None
    return near(found)


def near(found: DraftNodes) -> DraftNodes:
    """Those that hang on the tree."""
    level = found.levels()[0]
    return DraftNodes(found.parents[level], found.tokens[level], found.scores[level])


def holds(thing: object, name: str) -> bool:
    """Whether the name can be reached from the object, by whatever it keeps."""
    seen: set[int] = set()
    stack = [thing]
    while stack:
        found = stack.pop()
        if id(found) in seen or isinstance(
            found, type | types.ModuleType | types.FunctionType | types.MethodType
        ):
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
    """As long as nobody commits, a drafter falls silent; each of its messages is one that a target takes."""
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


# A model


class Counting(ToyModel):
    """Remembers the rows of each part of each pass."""

    def __init__(self, vocabulary: int = 12) -> None:
        super().__init__(vocabulary)
        self.passes: list[list[int]] = []

    def forward_all(self, parts: Sequence[PassInput]) -> list[np.ndarray]:
        self.passes.append([len(part.rows.tokens) for part in parts])
        return super().forward_all(parts)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 2)), max_size=10),
    st.integers(0, 999),
    st.sampled_from([0.0, 0.9]),
)
@settings(max_examples=60)
def test_its_cache_never_shows(
    history: list[tuple[int, int, int]], seed: int, temperature: float
) -> None:
    """After any growth and commits, each guess is what the model says of that very text. The toy checks all positions."""
    model, random = ToyModel(vocabulary=12), Random(seed)
    drafter, text = ModelDrafter(model, branches=2), text_of(PROMPT, temperature=temperature)
    tree, tokens = text.tree, text.tokens
    assert isinstance(tokens, list)
    for passes, known, unknown in [*history, (1, 0, 0)]:
        for _ in range(passes):
            leaves = Frontier(tree, 20, -50.0).best(random.randint(1, 4))
            found = expanded(drafter, text, leaves)
            assert sorted(set(found.parents.tolist())) == sorted(leaves)
            for leaf in leaves:
                path = [*tokens, *tree.tokens_to(leaf)]
                expected, _ = candidates(
                    torch.as_tensor(model.logits(path))[None],
                    SamplingInput(text.sampling, text.prompt, path, [[]], frozenset()),
                    2,
                )
                assert found.tokens[found.parents == leaf].tolist() == expected[0].tolist()
                tree.expanded[leaf] = True
            for parent, token, score in zip(
                found.parents.tolist(), found.tokens.tolist(), found.scores.tolist(), strict=True
            ):
                tree.add(parent, token, score)
            assert drafter.kept["s"].cache.length <= len(tokens) + len(tree)
        decided, node = [], 0
        for _ in range(known):
            if children := tree.children(node):
                node = random.choice(children)
                decided.append(tree.token[node])
        decided += [random.randrange(12) for _ in range(unknown)]
        if decided:
            tree.reroot(decided)
            tokens.extend(decided)


def test_after_a_hit_nothing_is_computed_twice() -> None:
    """Commits along its own guesses: every token of the text and of the tree goes through the model once."""

    model = Counting(vocabulary=12)
    drafter, text = ModelDrafter(model, branches=1), text_of(PROMPT)
    tokens = text.tokens
    assert isinstance(tokens, list)
    for _ in range(12):
        (leaf,) = Frontier(text.tree, 20, -1e9).best(1)
        found = expanded(drafter, text, [leaf])
        text.tree.expanded[leaf] = True
        text.tree.add(leaf, int(found.tokens[0]), -0.1)
        if len(text.tree) > 4:
            decided = text.tree.tokens_to(2)
            text.tree.reroot(decided)
            tokens.extend(decided)
    assert sum(sum(rows) for rows in model.passes) == len(PROMPT) + 11


def test_leaves_of_all_sessions_go_through_the_model_together() -> None:
    model = Counting()
    drafter = ModelDrafter(model, branches=2)
    texts = [text_of([*PROMPT, token], f"s{token}") for token in range(3)]
    drafter.expand([ExpandRequest(text, [0]) for text in texts])
    for text in texts:
        for token in (1, 2):
            text.tree.add(0, token, -0.5)
    found = drafter.expand(
        [ExpandRequest(text, [1, 2], branches) for branches, text in enumerate(texts)]
    )
    assert model.passes == [[11, 11, 11], [2, 2, 2]]
    assert [len(children.tokens) for children in found if children is not None] == [4, 2, 4]


def test_after_a_miss_one_narrow_pass_gives_the_children_of_the_new_root() -> None:
    model, sent = Counting(), list[Reply]()
    draft_engine = DraftEngine(ModelDrafter(model), "d", 4)
    draft_engine.handle(
        0, Open("s", 0, tuple(PROMPT), len(PROMPT), SamplingParams(), Share("s", 0, 1)), sent.append
    )
    for _ in range(5):
        draft_engine.step()
    tree = draft_engine.states["0/s"].tree
    missed = next(token for token in range(12) if tree.child(0, token) is None)
    draft_engine.handle(
        0, Commit("s", 0, len(PROMPT), (missed, 3), text_key([*PROMPT, missed, 3])), sent.append
    )
    model.passes.clear()
    sent.clear()
    draft_engine.step()
    assert model.passes == [[2]]
    (draft,) = sent
    assert isinstance(draft, Draft)
    assert set(draft.parents.tolist()) == {text_key([*PROMPT, missed, 3])}


def test_a_long_text_is_read_in_pieces_beside_the_others() -> None:
    model = Counting()
    drafter = ModelDrafter(model, branches=1, chunk=20)
    short, long = text_of(PROMPT, "short"), text_of([n * n % 12 for n in range(60)], "long")
    answers = []
    for _ in range(4):
        first, second = drafter.expand(
            [
                ExpandRequest(long, [0]),
                ExpandRequest(short, Frontier(short.tree, 20, -50.0).best(1)),
            ]
        )
        assert second is not None
        (leaf,) = second.parents.tolist()
        short.tree.expanded[leaf] = True
        short.tree.add(leaf, int(second.tokens[0]), -0.1)
        answers.append(first)
    assert model.passes == [[11, 10], [20, 1], [20, 1], [9, 1]]
    assert answers[:3] == [None] * 3
    assert answers[3] is not None
    assert answers[3].tokens.tolist() == [int(model.logits(long.tokens).argmax())]


@pytest.mark.parametrize("closed", [True, False])
def test_a_beginning_that_was_read_is_not_read_again(closed: bool) -> None:
    model = Counting()
    drafter = ModelDrafter(model, branches=1)
    common = [n * 5 % 12 for n in range(40)]
    expanded(drafter, text_of([*common, 1, 2], "first"), [0])
    if closed:
        drafter.close("first")
    found = expanded(drafter, text_of([*common, 7, 7, 7], "second"), [0])
    assert model.passes == [[42], [3]]
    assert found.tokens.tolist() == [int(model.logits([*common, 7, 7, 7]).argmax())]


def test_a_session_whose_pass_fails_is_given_up_alone() -> None:
    """Its text has a token that its model has not: the pass of all fails, and then its own."""

    class StrictModel(ToyModel):
        def forward_all(self, parts: Sequence[PassInput]) -> list[np.ndarray]:
            if any((part.rows.tokens == 99).any() for part in parts):
                raise InvalidRequest("token 99")
            return super().forward_all(parts)

    sent: list[Reply] = []
    draft_engine = DraftEngine(ModelDrafter(StrictModel(vocabulary=12), branches=1), "d", 4)
    for session, text in (("a", PROMPT), ("bad", [1, 99]), ("b", PROMPT[:-1])):
        draft_engine.handle(
            0,
            Open(session, 0, tuple(text), len(text), SamplingParams(), Share(session, 0, 1)),
            sent.append,
        )
    draft_engine.step()
    draft_engine.step()
    assert [reply.session for reply in sent] == ["a", "b"] * 2
    assert list(draft_engine.states) == ["0/a", "0/b"]
    assert draft_engine.counters == {"failed": 1}


def test_what_the_filters_bar_is_not_proposed() -> None:
    found = expanded(
        ModelDrafter(LOOPING, branches=4), text_of(PROMPT, temperature=1.0, top_k=1), [0]
    )
    assert found.tokens.tolist() == [int(LOOPING.logits(PROMPT).argmax())]
    assert found.scores.tolist() == [0.0]


def test_it_is_silent_beyond_its_own_context() -> None:
    small = ToyModel(vocabulary=16, memory=2, context=16)
    drafter = ModelDrafter(small)
    assert len(expanded(drafter, text_of(PROMPT + [1] * 6), [0]).tokens) > 0
    assert len(expanded(drafter, text_of(PROMPT + [1] * 7), [0]).tokens) == 0
    request = asking(PROMPT, max_tokens=40)
    (drafted,) = Lockstep(engine_of(LOOPING), DraftEngine(ModelDrafter(small), "d")).run(request)
    assert drafted.said() == plain(LOOPING, request).said()
    assert 0 < drafted.stats.accepted < 10
