"""S3D drafts with some of the target's layers, an adapter, and mask rows for later places."""

import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.compose import build_drafter
from actors.drafter import DraftActor
from actors.launch.prepare import check_models
from bench.core import widen as widening
from bench.core.widen import WideShape, widen_folder, widen_head
from runtime.config import DrafterConfig, Placement
from runtime.core import limits
from runtime.core.draft_nodes import DraftNodes, stack
from runtime.core.errors import ModelRefused
from runtime.core.messages import Commit, Draft, Open, Reply, Share
from runtime.core.node_keys import mix64, text_key
from runtime.core.sampling_params import SamplingParams
from runtime.core.tree import TokenTree
from runtime.deployment_builder import build_deployment, resolve_drafter
from runtime.draft.draft_engine import DraftEngine
from runtime.drafters.base import ExpandRequest, Text
from runtime.drafters.s3d import BRANCHES, MaskDrafter, build
from runtime.kv.prefix_cache import PrefixCache
from runtime.model_paths import draft_model
from runtime.models.loader import load_model
from runtime.models.lora import LoraLinear, linear_layers, lora_by_name, merge
from runtime.models.sampler import choose
from tests.support.harness import Lockstep, asking, children, engine_of, plain
from tests.support.masks import LAYERS, MASKS, drafter, ingredients, tiny
from training import s3d as training
from training.teacher import load_teacher

TEXT = [5, 6, 7, 8, 5, 6, 9, 11]


def text_of(tokens: Sequence[int], **sampling: Any) -> Text:
    tree = TokenTree(text_key(tokens), tokens[-1], limits.TREE_NODES, limits.TREE_DEPTH)
    return Text("s", list(tokens), len(tokens), SamplingParams(**sampling), tree)


def levels(found: DraftNodes) -> list[DraftNodes]:
    """Returns guesses level by level; parents are places in the level before."""
    places = [np.arange(len(found.tokens))[level] for level in found.levels()]
    parents = [found.parents[places[0]]]
    parents += [
        np.searchsorted(above, found.parents[here] - (found.roots or 0))
        for above, here in pairwise(places)
    ]
    return [
        DraftNodes(hung, found.tokens[here], found.scores[here])
        for hung, here in zip(parents, places, strict=True)
    ]


def changed_module() -> Any:
    """The layers of the target that stay, with the adapter in their weights."""
    found = tiny()
    module: Any = load_model(str(found.target), step="generic").module
    module.model.layers = torch.nn.ModuleList(module.model.layers[layer] for layer in LAYERS)
    with torch.no_grad():
        for layer, part in zip(module.model.layers, found.made.layers, strict=True):
            for name, linear in linear_layers(layer).items():
                pair = lora_by_name(part)[name]
                linear.weight += pair.up @ pair.down
    return module


def straight(tokens: Sequence[int]) -> Tensor:
    """Returns logits (1 + MASKS, vocabulary) of the last token and its masks, as plain text."""
    module = changed_module()
    with torch.inference_mode():
        embedded = torch.cat(
            [module.model.embed_tokens(torch.tensor(tokens)), tiny().made.mask_embed]
        )
        logits: Tensor = module(inputs_embeds=embedded[None], use_cache=False).logits[
            0, len(tokens) - 1 :
        ]
    return logits


def test_masks_guess_what_they_would_as_tokens_of_the_text() -> None:
    (found,) = drafter(tiny()).expand([ExpandRequest(text_of(TEXT), [0])])
    assert found is not None
    near, *far = levels(found)
    logits = straight(TEXT).log_softmax(-1)
    assert len(far) == MASKS
    best = logits.topk(4)
    assert near.tokens.tolist() == best.indices[0].tolist()
    np.testing.assert_allclose(near.scores, best.values[0], atol=1e-4)
    for place, level in enumerate(far, start=1):
        assert level.parents.tolist() == [0] * BRANCHES
        assert level.tokens.tolist() == best.indices[place, :BRANCHES].tolist()
        np.testing.assert_allclose(level.scores, best.values[place, :BRANCHES], atol=1e-4)


def test_training_computes_what_the_drafter_will() -> None:
    found = tiny()
    teacher = load_teacher(str(found.target), "cpu")
    with torch.no_grad():
        states, own = training.make_forward(found.made, teacher, LAYERS)(
            teacher.states(torch.tensor([TEXT]))
        )
        logits = teacher.unembed(states[:, 0])
    assert states.shape == (1 + MASKS, 1, len(TEXT), 32)
    assert float(own) == 0.0
    for place in (0, 3, len(TEXT) - 1):
        torch.testing.assert_close(
            logits[:, place], straight(TEXT[: place + 1]), atol=1e-4, rtol=1e-4
        )
    with torch.no_grad():  # nothing of the adapter is left on the target
        torch.testing.assert_close(
            teacher.unembed(teacher.states(torch.tensor([TEXT])).last),
            teacher.module(torch.tensor([TEXT])).logits,
        )


def test_an_untrained_one_is_the_layers_alone() -> None:
    found = tiny()
    teacher = load_teacher(str(found.target), "cpu")
    one, two = (training.new_s3d(teacher, LAYERS, MASKS, 2, seed) for seed in (1, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    part = load_model(str(found.target), layers=LAYERS, step="generic").module
    with torch.no_grad():
        states, _ = training.make_forward(one, teacher, LAYERS)(
            teacher.states(torch.tensor([TEXT]))
        )
        torch.testing.assert_close(
            teacher.unembed(states[0]), part(torch.tensor([TEXT])).logits, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(1, []), (2, []), (3, [1]), (9, [2, 3, 4, 5, 6, 7]), (32, list(range(8, 31)))],
)
def test_the_middle(layers: int, expected: list[int]) -> None:
    assert training.default_skipped(layers) == expected


# The drafter


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_output_is_the_targets_and_is_guessed_sooner(temperature: float) -> None:
    """The target itself in place of some of its layers: what it is right about is right at once."""
    target = load_model(str(tiny().target))
    request = asking(TEXT, max_tokens=40, temperature=temperature, seed=2)
    (found,) = Lockstep(
        engine_of(target, chooser=choose), DraftEngine(drafter(tiny()), "d", 2)
    ).run(request)
    assert found.said() == plain(target, request, chooser=choose).said()
    assert found.stats.verified > 0


def grown(draft_engine: DraftEngine, sent: list[Reply]) -> list[tuple[int, int]]:
    """(parent, token) of all that one pass has sent."""
    sent.clear()
    draft_engine.step()
    draft_engine.send_unsent(())
    drafts = [reply for reply in sent if isinstance(reply, Draft)]
    return [
        pair
        for draft in drafts
        for pair in zip(draft.parents.tolist(), draft.tokens.tolist(), strict=True)
    ]


def opened(draft_engine: DraftEngine, sent: list[Reply], tokens: Sequence[int] = TEXT) -> None:
    draft_engine.handle(
        0,
        Open("s", 0, tuple(tokens), len(tokens), SamplingParams(max_tokens=100), Share("s", 0, 1)),
        sent.append,
    )


def test_one_pass_brings_a_chain() -> None:
    sent: list[Reply] = []
    draft_engine = DraftEngine(drafter(tiny()), "d", 2)
    opened(draft_engine, sent)
    assert len(grown(draft_engine, sent)) >= 4 + MASKS
    assert max(draft_engine.states["0/s"].tree.depth) == 1 + MASKS


def test_what_masks_have_guessed_is_read_in_one_pass_with_what_is_above() -> None:
    """After nested leaves, hits and misses, each guess equals that of a fresh drafter."""
    sent: list[Reply] = []
    draft_engine, anew = DraftEngine(drafter(tiny()), "d", 4), drafter(tiny())
    anew.finished = PrefixCache(0)
    opened(draft_engine, sent)
    tokens = list(TEXT)
    for step in range(12):
        for _ in range(step % 3 + 1):
            state = draft_engine.states["0/s"]
            asked = draft_engine.plan()[0]
            (answer,) = draft_engine.expand([asked])
            assert answer is not None
            for leaf in asked.leaves:
                (alone,) = anew.expand(
                    [ExpandRequest(text_of([*tokens, *state.tree.tokens_to(leaf)]), [0])]
                )
                anew.close("s")
                assert alone is not None
                near, *_ = levels(alone)
                assert answer.tokens[answer.parents == leaf].tolist() == near.tokens.tolist()
                np.testing.assert_allclose(
                    answer.scores[answer.parents == leaf], near.scores, atol=1e-3
                )
            draft_engine.insert_answers([asked], [answer])
        tree = draft_engine.states["0/s"].tree
        node = int(np.argmax(np.frombuffer(tree.depth, np.int64)))
        decided = tree.tokens_to(node)[: 1 + step % 4] if step % 4 != 3 else [step]
        tokens += decided
        draft_engine.handle(
            0,
            Commit("s", 0, len(tokens) - len(decided), tuple(decided), text_key(tokens)),
            sent.append,
        )
    assert draft_engine.counters == {}


def test_at_the_end_of_the_context_it_has_no_masks_and_then_nothing_to_say() -> None:
    found = drafter(tiny(context=16))
    depths = []
    for length in (13, 14, 16, 17):
        (answer,) = found.expand([ExpandRequest(text_of((TEXT * 3)[:length]), [0])])
        found.close("s")
        assert answer is not None
        depths.append(len(levels(answer)) if len(answer.tokens) else 0)
    assert depths == [1 + MASKS, 1, 1, 0]


def test_what_is_barred_is_not_guessed() -> None:
    (found,) = drafter(tiny()).expand([ExpandRequest(text_of(TEXT, temperature=1.0, top_k=1), [0])])
    assert found is not None
    assert [len(level.tokens) for level in levels(found)] == [1] * (1 + MASKS)


# What hangs below guesses


class Chains:
    """Returns two tokens for each leaf, then two below the second and two below the first."""

    feature_spec = None

    def expand(self, requests: Sequence[ExpandRequest]) -> list[DraftNodes]:
        below = [children([(1, 7, -0.2), (1, 8, -0.3)]), children([(0, 9, -0.1), (1, 10, -0.4)])]
        near = [
            children([(request.leaves[0], 5, -0.1), (request.leaves[0], 6, self.second)])
            for request in requests
        ]
        return [
            stack([one, *below], len(request.text.tree))
            for one, request in zip(near, requests, strict=True)
        ]

    def __init__(self, second: float) -> None:
        self.second = second

    def close(self, session: str) -> None:
        pass


def test_guesses_below_guesses_are_sent_with_them() -> None:
    sent: list[Reply] = []
    draft_engine = DraftEngine(Chains(-0.5), "d", 1)
    opened(draft_engine, sent)
    root = text_key(TEXT)
    six, seven = mix64(root, 6), mix64(mix64(root, 6), 7)
    assert grown(draft_engine, sent) == [
        (root, 5),
        (root, 6),
        (six, 7),
        (six, 8),
        (seven, 9),
        (mix64(six, 8), 10),
    ]
    assert not any(draft_engine.states["0/s"].tree.expanded[1:])


def test_what_is_below_a_guess_that_is_left_out_is_left_out() -> None:
    sent: list[Reply] = []
    draft_engine = DraftEngine(Chains(-50.0), "d", 1)
    opened(draft_engine, sent)
    assert grown(draft_engine, sent) == [(text_key(TEXT), 5)]


# The folder


def test_a_folder_or_its_name_is_a_draft() -> None:
    folder = str(tiny().folder)
    assert resolve_drafter(folder) == ("s3d", folder, ())
    assert resolve_drafter("s3d") == ("s3d", "", ())
    made = build_deployment(str(tiny().target), (folder,), 1, "float32", "cpu", local=False)
    check_models(made)
    host = build_drafter(made.drafters()[0], str(tiny().target))
    assert isinstance(host.draft_engine.drafter, MaskDrafter)
    assert draft_model(DrafterConfig(name="d", method="s3d", model="x")) == "x"
    assert draft_model(DrafterConfig(name="d", method="ngram")) == ""


def edited(tmp_path: Path, **settings: object) -> Path:
    folder = Path(shutil.copytree(tiny().folder, tmp_path / "s3d"))
    config = json.loads((folder / "config.json").read_text())
    config["settings"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"layers": []}, "must rise and lie between 0 and 2"),
        ({"layers": [0, 3]}, "must rise and lie between 0 and 2"),
        ({"layers": [2, 0]}, "must rise and lie between 0 and 2"),
        ({"layers": [0, 0]}, "must rise and lie between 0 and 2"),
        ({"layers": "02"}, "must rise and lie between 0 and 2"),
        ({"masks": 0}, "masks 0 is not an integer from 1 to 16"),
        ({"masks": 2}, "does not fit its config.json"),
        ({"rank": 10**9}, "rank 1000000000 is not an integer"),
        ({"layers": [0]}, "does not fit its config.json"),
    ],
)
def test_a_folder_that_was_tampered_with_is_refused(
    tmp_path: Path, settings: dict[str, object], says: str
) -> None:
    with pytest.raises(ModelRefused, match=says):
        build(ingredients(tiny().target, edited(tmp_path, **settings)))


def test_what_was_trained_for_another_target_is_refused() -> None:
    made = build_deployment(
        str(tiny(context=16).target),
        (str(tiny(vocabulary=16).folder),),
        1,
        "auto",
        "cpu",
        local=False,
    )
    with pytest.raises(ModelRefused, match="was trained for another target"):
        check_models(made)


def test_merged_weights_stay_as_short_as_they_were() -> None:
    layer = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(64, 64, bias=False)})
    linear = layer["q_proj"]
    assert isinstance(linear, torch.nn.Linear)
    linear.weight.data = linear.weight.data.bfloat16().float()
    before, pair = linear.weight.detach().clone(), LoraLinear(64, 64, 2)
    torch.nn.init.normal_(pair.up, std=0.1)
    merge([layer], torch.nn.ModuleList([torch.nn.ModuleDict({"q_proj": pair})]))
    assert torch.equal(linear.weight, linear.weight.bfloat16().float())
    torch.testing.assert_close(
        linear.weight.detach(), before + (pair.up @ pair.down).detach(), atol=0.0, rtol=2**-8
    )


def test_widened_with_its_target_it_guesses_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(widening, "CACHE", tmp_path)
    found = tiny()
    wide = widen_folder(found.target, WideShape(hidden=96, layers=4, ffn=160), "float32")
    answers = [
        levels(answer)
        for folder, target in (
            (found.folder, found.target),
            (widen_head(found.folder, wide), wide),
        )
        for answer in build(ingredients(target, folder)).expand([ExpandRequest(text_of(TEXT), [0])])
        if answer is not None
    ]
    for narrow, same in zip(*answers, strict=True):
        assert narrow.tokens.tolist() == same.tokens.tolist()
        np.testing.assert_allclose(narrow.scores, same.scores, atol=1e-2)


def test_an_actor_serves_a_folder_of_what_was_trained() -> None:
    """Which has no tokenizer: it is the target's."""
    found = tiny()
    config = DrafterConfig(
        name="d", method="s3d", model=str(found.folder), placement=Placement(listen="127.0.0.1")
    )
    actor = DraftActor(config, str(found.target))
    try:
        assert actor.start().address
    finally:
        actor.stop()
