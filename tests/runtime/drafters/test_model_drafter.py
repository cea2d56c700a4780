"""A drafting model caches, batches and forgets its texts."""

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.core.errors import InvalidRequest
from runtime.core.messages import Commit, Draft, Open, Reply, Share
from runtime.core.node_keys import text_key
from runtime.core.sampler_reference import SamplingInput
from runtime.core.sampling_params import SamplingParams
from runtime.draft.draft_engine import DraftEngine
from runtime.draft.frontier import Frontier
from runtime.drafters.base import ExpandRequest
from runtime.drafters.model import ModelDrafter
from runtime.models.base import PassInput
from runtime.models.sampler import candidates
from runtime.models.toy import ToyModel
from tests.support.drafters import LOOPING, PROMPT, expanded, text_of
from tests.support.harness import Lockstep, asking, engine_of, plain


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
    """After any growth and commits, each guess is the model's own for that text."""
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
    """With commits along its guesses, every token goes through the model once."""

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
    """Its model fails on a token of its text: the pass of all fails, and then its own."""

    class StrictModel(ToyModel):
        def forward_all(self, parts: Sequence[PassInput]) -> list[np.ndarray]:
            if any((part.rows.tokens == 99).any() for part in parts):
                raise InvalidRequest("token 99")
            return super().forward_all(parts)

    sent: list[Reply] = []
    draft_engine = DraftEngine(ModelDrafter(StrictModel(vocabulary=100), branches=1), "d", 4)
    for session, text in (("a", PROMPT), ("bad", [1, 99]), ("b", PROMPT[:-1])):
        draft_engine.handle(
            0,
            Open(session, 0, tuple(text), len(text), SamplingParams(), Share(session, 0, 1)),
            sent.append,
        )
    draft_engine.step()
    draft_engine.step()
    assert [reply.session for reply in sent if isinstance(reply, Draft)] == ["a", "b"] * 2
    assert list(draft_engine.states) == ["0/a", "0/b"]
    assert draft_engine.counters == {"failed": 1}


class Narrow(ToyModel):
    """The first columns of another model's logits; an id beyond them is an error, as for tables."""

    def __init__(self, whole: ToyModel, columns: int) -> None:
        super().__init__(columns, memory=whole.memory)
        self.whole = whole

    def forward_all(self, parts: Sequence[PassInput]) -> list[np.ndarray]:
        if any((part.rows.tokens >= self.vocabulary).any() for part in parts):
            raise InvalidRequest("a token outside the vocabulary")
        return super().forward_all(parts)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        return self.whole.logits(tokens)[: self.vocabulary]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.8, "seed": 6, "top_p": 0.9, "repetition_penalty": 1.3},
        {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
        {"logit_bias": ((23, 3.0), (2, 1.0))},
        {"logit_bias": ((23, 3.0),)},
    ],
)
@pytest.mark.parametrize("columns", [16, 20])
def test_a_draft_that_lacks_tokens_of_the_target(params: dict[str, Any], columns: int) -> None:
    """It knows 16 of 24: it stays, its guesses are taken, and none is beyond what it knows."""
    whole = ToyModel(vocabulary=24, memory=2)
    draft = DraftEngine(ModelDrafter(Narrow(whole, columns), 2, tokens=16, unknown=7), "d", 4)
    guessed: list[int] = []

    def look(message: Any) -> list[Any]:
        guessed.extend(message.tokens.tolist() if isinstance(message, Draft) else ())
        return [message]

    request = asking([3, 23, 4, 1], max_tokens=120, **params)
    (drafted,) = Lockstep(engine_of(whole), draft, tamper=look).run(request)
    assert drafted.said() == plain(whole, request).said()
    assert max(drafted.tokens) > 15
    assert drafted.stats.accepted > 5
    assert max(guessed) == 15
    assert not draft.counters


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
