"""A block drafter guesses all next places from one pass, and orders them by light ones."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from runtime.core.draft_nodes import DraftNodes
from runtime.core.errors import ModelRefused
from runtime.core.features import FeatureRows
from runtime.core.noise import gumbel
from runtime.draft.draft_engine import DraftEngine
from runtime.drafters.base import ExpandRequest, Text
from runtime.models.loader import load_model
from runtime.models.sampler import choose
from tests.support.blocks import PLACES, drafter, straight, tiny
from tests.support.drafters import text_of
from tests.support.eagles import features_of
from tests.support.eagles import tiny as tiny_eagle
from tests.support.expansions import expand, insert, text_with
from tests.support.harness import Lockstep, asking, engine_of, plain

PROMPT = [int(token) for token in np.random.default_rng(5).integers(0, 4096, 30)]


def features_after(tokens: Sequence[int], start: int = 0) -> FeatureRows:
    return features_of(tiny_eagle(), tokens, start)


def check_children(text: Text, nodes: DraftNodes, leaf: int) -> None:
    """The children of a leaf are the most probable ones, by the module alone."""
    assert text.features is not None
    path = text.tree.tokens_to(leaf)
    best = straight(tiny(), text.features, text.tokens, path).log_softmax(-1).topk(4)
    of_leaf = nodes.parents == leaf
    ids = tiny().block.draft_tokens[best.indices]
    assert nodes.tokens[of_leaf].tolist() == ids.tolist()
    np.testing.assert_allclose(nodes.scores[of_leaf], best.values, atol=2e-3)


def committed(text: Text, tokens: Sequence[int]) -> Text:
    """The text after a commit, with its features."""
    after = [*text.tokens, *tokens]
    text.tree.reroot(tokens)
    return replace(text, tokens=after, features=features_after(after))


@pytest.mark.parametrize("start", [0, 7])
def test_guesses_of_all_places_are_those_of_the_module_alone(start: int) -> None:
    found, text = drafter(tiny()), text_with(PROMPT, start)
    level = [0]
    for depth in range(PLACES):
        nodes = expand(found, text, level)
        for leaf in level:
            check_children(text, nodes, leaf)
        made = insert(text, nodes)
        level = [made[0], made[-1], made[2]]
        assert {text.tree.depth[leaf] for leaf in level} == {depth + 1}
    assert len(expand(found, text, level).tokens) == 0


def test_one_heavy_pass_serves_a_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    found, text = drafter(tiny()), text_with(PROMPT)
    passes, real = list[int](), found.model.places

    def counted(parts: Any) -> Any:
        passes.append(len(parts))
        return real(parts)

    monkeypatch.setattr(found.model, "places", counted)
    level = [0]
    for _ in range(3):
        level = insert(text, expand(found, text, level))
    assert len(text.tree) == 1 + 4 + 16 + 64
    assert passes == [1]
    text = committed(text, [text.tree.token[level[0]]])  # a miss: of another depth
    expand(found, text, [0])
    assert passes == [1, 1]


def test_after_a_miss_it_reads_the_features_of_what_was_committed() -> None:
    found, text = drafter(tiny()), text_with(PROMPT)
    insert(text, expand(found, text, [0]))
    text = committed(text, [11, 13, 17])
    check_children(text, expand(found, text, [0]), 0)


def test_a_surviving_tree_is_guessed_from_the_new_root() -> None:
    found, text = drafter(tiny()), text_with(PROMPT)
    first = insert(text, expand(found, text, [0]))
    insert(text, expand(found, text, first))
    text = committed(text, [text.tree.token[first[1]]])
    leaf = text.tree.children(0)[0]
    nodes = expand(found, text, [leaf])
    check_children(text, nodes, leaf)
    assert set(nodes.parents.tolist()) == {leaf}
    check_children(text, expand(found, text, [0]), 0)


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
    check_children(whole, answer, 0)


def test_several_texts_share_a_pass() -> None:
    texts = [text_with(PROMPT[:n], session=str(n)) for n in (9, 30, 17)]
    found = drafter(tiny())
    leaves = [[0] for _ in texts]
    for _ in range(2):
        requests = [ExpandRequest(*pair) for pair in zip(texts, leaves, strict=True)]
        together = found.expand(requests)
        for place, (request, nodes) in enumerate(zip(requests, together, strict=True)):
            assert nodes is not None
            for leaf in request.leaves:
                check_children(request.text, nodes, leaf)
            leaves[place] = insert(request.text, nodes)


def test_a_prefix_of_a_finished_text_is_not_read_again() -> None:
    found = drafter(tiny())
    expand(found, text_with(PROMPT), [0])
    found.close("s")
    assert not found.found
    text = text_with([*PROMPT, 3, 5], session="t")
    step = found.step(ExpandRequest(text, [0]))
    assert step is not None
    assert step.missing == 2
    check_children(text, expand(found, text, [0]), 0)


def test_it_is_coupled_to_the_targets_noise() -> None:
    text = text_with(PROMPT, temperature=0.7, seed=3)
    found = drafter(tiny())
    (leaf, *_) = insert(text, expand(found, text, [0]))
    nodes = expand(found, text, [leaf])
    assert text.features is not None
    logits = straight(tiny(), text.features, PROMPT, text.tree.tokens_to(leaf))
    top = logits.topk(64).indices
    ids = tiny().block.draft_tokens[top].numpy()
    noisy = logits[top].numpy() / 0.7 + gumbel(3, [len(PROMPT) + 1], ids)[0]
    assert nodes.tokens.tolist() == ids[np.argsort(-noisy)][:4].tolist()


def test_a_bias_counts() -> None:
    text = text_with(PROMPT, logit_bias=((8, 50.0), (9, 99.0)))
    nodes = expand(drafter(tiny()), text, [0])
    assert nodes.tokens[0] == 8
    assert 9 not in nodes.tokens  # which is no draft token


def test_a_failed_pass_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found, text = drafter(tiny()), text_with(PROMPT)
    first = insert(text, expand(found, text, [0]))
    text = committed(text, [text.tree.token[first[0]], 5])

    def fail(*args: Any) -> Any:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(found.model, "_layer", fail)
        with pytest.raises(RuntimeError):
            found.expand([ExpandRequest(text, [0])])
    assert found.kept["s"].cache.length == len(PROMPT)
    check_children(text, expand(found, text, [0]), 0)


def test_places_end_with_the_context() -> None:
    small = tiny(4096, 32)
    for length, depth in ((28, 4), (30, 3), (32, 1), (33, 0)):
        found = drafter(small)
        tokens = [*PROMPT, 1, 2, 3][:length]
        rows = np.zeros((length - 1, 96), np.uint16)
        text = replace(text_of(tokens, str(length)), features=FeatureRows(0, rows))
        level, deep = [0], 0
        while level := insert(text, expand(found, text, level[:1])):
            deep += 1
        assert deep == depth


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_real_target_says_what_it_says_alone(temperature: float) -> None:
    """With its own hidden states, float32 on a CPU, token for token."""
    model = load_model(str(tiny().target), "float32")
    request = asking(PROMPT, max_tokens=24, temperature=temperature, seed=6)
    engine = DraftEngine(drafter(tiny()), "d", 4)
    (drafted,) = Lockstep(engine_of(model, 8, chooser=choose), engine).run(request)
    assert drafted.said() == plain(model, request, chooser=choose).said()
    assert engine.nodes > 24
    assert engine.counters == {}


def test_a_folder_for_another_target_is_refused() -> None:
    with pytest.raises(ModelRefused, match="trained for another target"):
        drafter(tiny()._replace(folder=tiny(64).folder))


def test_no_weights_ship_for_an_unknown_target() -> None:
    with pytest.raises(ModelRefused, match="no block drafter ships for this target"):
        drafter(tiny()._replace(folder=""))  # type: ignore[arg-type]
