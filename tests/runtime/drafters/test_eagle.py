"""EAGLE drafts from the target's features and goes on from its own states."""

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np
import pytest

from runtime.core.draft_nodes import DraftNodes
from runtime.core.errors import ModelRefused
from runtime.core.features import FeatureRows
from runtime.core.noise import gumbel
from runtime.drafters import eagle
from runtime.drafters.base import ExpandRequest, Text
from runtime.drafters.eagle import EagleDrafter
from runtime.models.eagle_pass import guess_times
from tests.support.drafters import text_of
from tests.support.eagles import (
    drafter,
    features_of,
    greedy_texts,
    guessable,
    straight,
    tiny,
    trained,
)
from tests.support.expansions import expand, insert, text_with

PROMPT = [int(token) for token in np.random.default_rng(5).integers(0, 4096, 30)]


def check_children(text: Text, nodes: DraftNodes, leaf: int, tokens: Sequence[int]) -> None:
    """The children of a leaf are the most probable ones, by the module alone."""
    assert text.features is not None
    path = text.tree.tokens_to(leaf)
    logits = straight(tiny(), text.features, tokens, path).log_softmax(-1)
    best = logits.topk(4)
    of_leaf = nodes.parents == leaf
    ids = guessable(tiny(), tokens)[best.indices]
    assert nodes.tokens[of_leaf].tolist() == ids.tolist()
    np.testing.assert_allclose(nodes.scores[of_leaf], best.values, atol=2e-3)


@pytest.mark.parametrize("start", [0, 7])
def test_guesses_are_those_of_the_module_alone(start: int) -> None:
    """Text by features, level after level by own states, in one tree."""
    found, text = drafter(tiny()), text_with(PROMPT, start)
    nodes = expand(found, text, [0])
    check_children(text, nodes, 0, PROMPT)
    first = insert(text, nodes)
    second_nodes = expand(found, text, first[:3])
    for leaf in first[:3]:
        check_children(text, second_nodes, leaf, PROMPT)
    second = insert(text, second_nodes)
    third = [second[5], first[3], second[0]]
    third_nodes = expand(found, text, third)
    for leaf in third:
        check_children(text, third_nodes, leaf, PROMPT)


def committed(text: Text, tokens: Sequence[int]) -> Text:
    """The text after a commit, with its features."""
    after = [*text.tokens, *tokens]
    text.tree.reroot(tokens)
    return replace(text, tokens=after, features=features_of(tiny(), after))


def grown() -> tuple[EagleDrafter, Text, list[int]]:
    """A drafter with two levels of a tree."""
    found, text = drafter(tiny()), text_with(PROMPT)
    first = insert(text, expand(found, text, [0]))
    return found, text, insert(text, expand(found, text, first))


def test_after_a_miss_it_reads_the_features_of_what_was_committed() -> None:
    found, text, _ = grown()
    text = committed(text, [11, 13, 17])
    check_children(text, expand(found, text, [0]), 0, text.tokens)


def test_after_a_hit_the_root_is_guessed_anew_from_true_features() -> None:
    found, text, second = grown()
    node = text.tree.parent[second[0]]
    text = committed(text, [text.tree.token[node]])
    assert text.tree.expanded[0]
    assert len(text.tree) == 5
    before = {text.tree.token[child] for child in text.tree.children(0)}
    leaf = text.tree.children(0)[0]
    nodes = expand(found, text, [leaf])
    assert text.features is not None
    logits = straight(tiny(), text.features, text.tokens, [])
    best = guessable(tiny(), text.tokens)[logits.topk(4).indices].tolist()
    assert nodes.tokens[nodes.parents == 0].tolist() == [
        token for token in best if token not in before
    ]
    assert (nodes.parents == leaf).sum() == 4
    insert(text, nodes)
    # The rows of the text are the true ones now, whatever was in their slots before.
    text = committed(text, [text.tree.token[leaf], 40, 41])
    check_children(text, expand(found, text, [0]), 0, text.tokens)


def test_a_surviving_subtree_goes_on() -> None:
    """Rows of surviving nodes stay, and nodes below them attend to these and to the true text."""
    found, text, second = grown()
    node = text.tree.parent[second[0]]
    text = committed(text, [text.tree.token[node]])
    insert(text, expand(found, text, text.tree.children(0)[:2]))
    leaves = [text.tree.children(child)[0] for child in text.tree.children(0)[:2]]
    kept = found.kept["s"]
    assert kept.prefix == len(text.tokens)
    assert len(kept.slots) == 2
    assert set(expand(found, text, leaves).parents.tolist()) == set(leaves)
    assert len(kept.slots) == 4


def test_a_long_prompt_is_read_in_pieces_as_its_features_arrive() -> None:
    found, whole = drafter(tiny()), text_with(PROMPT)
    found.chunk = 8
    assert whole.features is not None
    rows = whole.features.rows
    for arrived in (0, 5, 5, 20, len(rows)):
        text = replace(whole, features=FeatureRows(0, rows[:arrived]))
        (answer,) = found.expand([ExpandRequest(text, [0])])
        assert answer is None
    while answer is None:
        (answer,) = found.expand([ExpandRequest(whole, [0])])
    check_children(whole, answer, 0, PROMPT)


def test_without_features_it_waits() -> None:
    found = drafter(tiny())
    text = text_of(PROMPT)
    assert found.expand([ExpandRequest(text, [0])]) == [None]
    (nothing,) = found.expand([ExpandRequest(text_of([5], "one token"), [0])])
    assert nothing is not None
    assert not len(nothing.tokens)
    none = FeatureRows(0, np.zeros((0, 96), np.uint16))
    assert found.expand([ExpandRequest(replace(text, features=none), [0])]) == [None]


def test_several_texts_share_a_pass() -> None:
    texts = [text_with([*PROMPT, *PROMPT[:n]], session=str(n)) for n in (9, 0, 17)]
    found = drafter(tiny())
    together = found.expand([ExpandRequest(text, [0]) for text in texts])
    for text, nodes in zip(texts, together, strict=True):
        assert nodes is not None
        check_children(text, nodes, 0, text.tokens)


def test_a_prefix_of_a_finished_text_is_not_read_again() -> None:
    found = drafter(tiny())
    expand(found, text_with(PROMPT), [0])
    found.close("s")
    text = text_with([*PROMPT, 3, 5], session="t")
    (step,) = [found.step(ExpandRequest(text, [0]))]
    assert step is not None
    assert step.missing == 2
    check_children(text, expand(found, text, [0]), 0, text.tokens)


def test_it_is_coupled_to_the_targets_noise() -> None:
    text = text_with(PROMPT, temperature=0.7, seed=3)
    nodes = expand(drafter(tiny()), text, [0])
    assert text.features is not None
    logits = straight(tiny(), text.features, PROMPT, [])
    top = logits.topk(64).indices
    ids = guessable(tiny(), PROMPT)[top].numpy()
    noisy = logits[top].numpy() / 0.7 + gumbel(3, [len(PROMPT)], ids)[0]
    assert nodes.tokens.tolist() == ids[np.argsort(-noisy)][:4].tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        {"frequency_penalty": 1.5},
        {"repetition_penalty": 1.8},
        {"logit_bias": ((8, 50.0), (9, 99.0))},
    ],
)
def test_penalties_and_biases_count(sampling: dict[str, Any]) -> None:
    tokens = [*PROMPT, 8, 8, 8, 8]
    text = text_with(tokens, **sampling)
    nodes = expand(drafter(tiny()), text, [0])
    if "logit_bias" in sampling:  # 9 is no draft token
        assert nodes.tokens[0] == 8
    assert not set(nodes.tokens.tolist()) & {9}
    assert len(nodes.tokens) == 4


def test_a_texts_own_tokens_are_guessed_too() -> None:
    """Those outside of the draft vocabulary, of the prompt and of the answer."""
    tokens = [*PROMPT, 8, 8, 8, 8]
    bias: dict[str, Any] = {"logit_bias": ((9, 99.0), (11, 98.0))}
    assert expand(drafter(tiny()), text_with(tokens, **bias), [0]).tokens[0] not in (9, 11)
    found = drafter(tiny())
    texts = [text_with([*tokens, 9], session="a", **bias), text_with(tokens, session="b", **bias)]
    first, second = found.expand([ExpandRequest(text, [0]) for text in texts])
    assert first is not None
    assert second is not None
    assert first.tokens[0] == 9
    assert 11 not in first.tokens
    assert not {9, 11} & set(second.tokens.tolist())
    assert found.kept["a"].own.tolist() == sorted({9, *(one for one in PROMPT if one % 2)})
    assert found.kept["b"].own.tolist() == sorted({one for one in PROMPT if one % 2})
    after = committed(texts[0], [11])
    assert expand(found, after, [0]).tokens[:2].tolist() == [9, 11]


def test_own_tokens_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eagle, "MAX_OWN_TOKENS", 3)
    found, text = drafter(tiny()), text_with(PROMPT)
    assert len(expand(found, text, [0]).tokens) == 4
    assert len(found.kept["s"].own) == 3


def test_a_failed_pass_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found, text, second = grown()

    def fail(*args: Any) -> Any:
        raise RuntimeError("no memory")

    length = found.kept["s"].cache.length
    with monkeypatch.context() as patch:
        patch.setattr(found.model, "_run", fail)
        with pytest.raises(RuntimeError):
            found.expand([ExpandRequest(text, second[:2])])
    assert found.kept["s"].cache.length == length
    nodes = expand(found, text, second[:2])
    for leaf in second[:2]:
        check_children(text, nodes, leaf, PROMPT)


def test_it_is_silent_at_the_end_of_the_context() -> None:
    small = tiny(4096, 32)
    found = drafter(small)
    for length, guesses in ((31, 4), (32, 4), (33, 0)):
        tokens = [*PROMPT, 1, 2, 3][:length]
        rows = np.zeros((length - 1, 96), np.uint16)
        text = replace(text_of(tokens, str(length)), features=FeatureRows(0, rows))
        assert len(expand(found, text, [0]).tokens) == guesses


def test_a_folder_for_another_target_is_refused() -> None:
    with pytest.raises(ModelRefused, match="trained for another target"):
        drafter(tiny()._replace(folder=tiny(64).folder))


def test_no_weights_ship_for_an_unknown_target() -> None:
    with pytest.raises(ModelRefused, match="no eagle drafter ships for this target"):
        drafter(tiny()._replace(folder=""))  # type: ignore[arg-type]


def test_features_of_another_width_are_an_error() -> None:
    text = replace(text_of(PROMPT), features=FeatureRows(0, np.zeros((29, 64), np.uint16)))
    with pytest.raises((RuntimeError, ValueError)):
        drafter(tiny()).expand([ExpandRequest(text, [0])])


def test_the_time_of_a_pass_is_measured_by_its_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    model, now = drafter(tiny()).model, 0.0

    def run(parts: Any) -> list[Any]:
        nonlocal now
        now += len(parts[0].tokens)
        return [np.zeros((max(1, len(parts[0].wanted)), 1))]

    assert all(seconds > 0 for seconds in guess_times(model, [1, 4], perf_counter).values())
    monkeypatch.setattr(model, "_run", run)
    assert guess_times(model, [1, 4], lambda: now) == {1: 1.0, 4: 4.0}


def test_features_are_what_it_is_right_by() -> None:
    """A trained one guesses the target's tokens, with the features of each token, not of others."""
    found = tiny(16)
    texts = greedy_texts(found, 6, 28)
    known = drafter(trained(found, texts))
    right = {"true": 0, "others": 0}
    for number, tokens in enumerate(texts.tolist()):
        for length in (14, 18, 22, 26):
            text = text_of(tokens[:length], f"{number} {length}")
            features = features_of(found, text.tokens)
            mixed = np.roll(features.rows, 5, axis=0)
            for name, rows in (("true", features.rows), ("others", mixed)):
                asked = replace(text, session=name, features=FeatureRows(0, rows))
                nodes = expand(known, asked, [0])
                right[name] += int(nodes.tokens[0]) == tokens[length]
                known.close(name)
                known.finished.kept.clear()
    assert right["true"] >= 22
    assert right["others"] <= 12
