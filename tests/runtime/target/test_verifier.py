"""Match-then-emit: for every draft, the tokens are those the target would write one by one."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.core.accepted_path import AcceptedPath, accept_path, accept_path_by_row
from runtime.core.messages import Logprob, Request
from runtime.core.sampler_reference import Allowed, SamplingInput, logprobs, reference_sample
from runtime.core.sampling_params import SamplingParams
from runtime.core.tree import TokenTree
from runtime.models.base import PassOutput
from runtime.models.toy import ToyModel
from runtime.scoring.calibration import TemperatureBucket
from runtime.target.session import Session
from runtime.target.verifier import Verifier

SMALL = st.integers(0, 2)


def follows(text: tuple[int, ...]) -> int:
    """A target: the token it chooses after each text."""
    return hash((7, *text)) % 3


@given(st.lists(st.tuples(st.integers(0, 30), SMALL), max_size=30), st.integers(0, 30))
def test_tokens_are_the_targets_own_for_any_tree_and_any_part_of_it(
    growth: list[tuple[int, int]], rows: int
) -> None:
    tree = TokenTree(1, 0, 64, 8)
    for place, token in growth:
        tree.add(place % len(tree), token, -0.5)
    nodes = tree.best_nodes(rows)
    texts = [(), *(tuple(tree.tokens_to(node)) for node in nodes)]
    accepted = accept_path(tree, nodes, [follows(text) for text in texts])
    written: tuple[int, ...] = ()
    while written in texts:
        written = (*written, follows(written))
    assert (*(tree.token[node] for node in accepted.path), accepted.token) == written
    asked: list[tuple[int, ...]] = []

    def choose(row: int) -> int:
        asked.append(texts[row])
        return follows(texts[row])

    assert accept_path_by_row(tree, nodes, choose) == accepted
    assert asked == [written[:n] for n in range(len(written))]
    assert set(accepted.path) <= set(nodes)


@pytest.mark.parametrize(
    ("nodes", "choices", "accepted"),
    [
        ([], [5], AcceptedPath((), 5)),
        ([1], [5, 7], AcceptedPath((1,), 7)),
        ([1], [6, 7], AcceptedPath((), 6)),  # a child that was not verified is not followed
        ([1, 2], [6, 7, 9], AcceptedPath((2,), 9)),
        ([1, 2, 3], [5, 8, 9, 4], AcceptedPath((1, 3), 4)),
        ([1, 3], [5, 8, 4], AcceptedPath((1, 3), 4)),
        ([1, 3], [9, 8, 4], AcceptedPath((), 9)),
    ],
)
def test_the_descent(nodes: list[int], choices: list[int], accepted: AcceptedPath) -> None:
    tree = TokenTree(1, 0, 64, 8)
    assert [tree.add(0, 5, -0.1), tree.add(0, 6, -0.2), tree.add(1, 8, -0.1)] == [1, 2, 3]
    assert accept_path(tree, nodes, choices) == accepted


TOY = ToyModel(vocabulary=16, memory=3)
PROMPT = (3, 1, 4)
EOS = frozenset({2, 9})


@dataclass
class Parity:
    """A constraint: even and odd tokens take turns, and the end may come at any time."""

    taken: list[int] = field(default_factory=list)
    masks: int = 0

    def allowed(self) -> Allowed:
        self.masks += 1
        mask: Allowed = np.arange(TOY.vocabulary) % 2 == len(self.taken) % 2
        mask[sorted(EOS)] = True
        return mask

    def accept_token(self, token: int) -> None:
        self.taken.append(token)


def plain(sampling: SamplingParams, grammar: Parity | None) -> list[tuple[int, Logprob]]:
    """Tokens of a text written one by one, with their logprobs, also after an end of text."""
    text, written = list(PROMPT), list[tuple[int, Logprob]]()
    while len(written) < 40:
        logits = TOY.logits(text)[None]
        mask = None if grammar is None else grammar.allowed()[None]
        ask = SamplingInput(sampling, len(PROMPT), text, [[]], EOS, mask)
        token = int(reference_sample(logits, ask)[0])
        if grammar is not None:
            grammar.accept_token(token)
        written.append((token, logprobs(logits, [token], sampling.logprobs or 0)[0]))
        text.append(token)
    return written


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("k", [None, 0, 3])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=30),
        SamplingParams(max_tokens=30, min_tokens=30),
        SamplingParams(max_tokens=30, temperature=0.9, seed=5, min_tokens=8),
        SamplingParams(max_tokens=30, temperature=1.2, seed=6, frequency_penalty=1.5),
    ],
)
def test_a_decision_is_what_the_target_would_write_token_by_token(
    sampling: SamplingParams, k: int | None, constrained: bool
) -> None:
    """Tokens and their logprobs, with guesses that are right for a while, and beside them wrong
    ones. A constraint is asked once for each token decided, and hears each of them once.
    """
    sampling = replace(sampling, logprobs=k)
    expected = plain(sampling, Parity() if constrained else None)
    session = Session(
        Request("s", PROMPT, sampling), TOY.vocabulary, TOY.context, TemperatureBucket()
    )
    verifier, grammar = Verifier(reference_sample, EOS), Parity() if constrained else None
    found, lengths = list[tuple[int, Logprob]](), set[int]()
    while len(found) < 32:
        node, right = 0, len(found) % 4  # so many guesses are right
        for token, _ in expected[len(found) :][:right]:
            session.tree.add(node, (token + 1) % TOY.vocabulary, -1.0)
            session.tree.add(node, token, -0.5)
            node = session.tree.child(node, token) or 0
        nodes = session.select(12)
        texts = [[*session.tokens, *path] for path in session.paths(nodes)]
        output = PassOutput(np.stack([TOY.logits(text) for text in texts]))
        decision = verifier.decide(session, grammar, nodes, output)
        accepted = decision.accepted
        tokens = [*(session.tree.token[node] for node in accepted.path), accepted.token]
        assert decision.output is output
        assert len(decision.logprobs) == (0 if k is None else len(tokens))
        scored = decision.logprobs or tuple(
            scored for _, scored in expected[len(found) :][: len(tokens)]
        )
        found += zip(tokens, scored, strict=True)
        lengths.add(len(tokens))
        session.apply(accepted)
    assert found == expected[: len(found)]
    assert len(lengths) > 1
    if grammar is not None:
        assert grammar.taken == [token for token, _ in found]
        assert grammar.masks == len(found)
