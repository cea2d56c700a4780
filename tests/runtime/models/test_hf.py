"""Every family computes for a tree what it computes for each of its paths alone."""

import logging
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers.modeling_utils import AttentionInterface

from runtime.core.errors import InvalidRequest
from runtime.core.tree import TokenTree
from runtime.kv.base import KVCache
from runtime.models.base import Model, PassInput, Rows, causal
from runtime.models.fast_path import enable_fast_path
from runtime.models.generic import ATTENTION_NAME
from runtime.models.hf import HFModel
from runtime.models.prefill import prefill
from runtime.models.rollback_check import check_rollback
from tests.support.families import FAMILIES, VOCABULARY, hf_model

TOLERANCE = 1e-4  # on logits whose standard deviation is 1.5
PROMPT = np.random.default_rng(7).integers(0, VOCABULARY, 10)

families = pytest.mark.parametrize("family", FAMILIES)


def grown(nodes: int, seed: int = 0) -> TokenTree:
    """Returns a random tree rooted at the last token of PROMPT."""
    rng = np.random.default_rng(seed)
    tree = TokenTree(0, int(PROMPT[-1]), max_nodes=nodes, max_depth=64)
    while len(tree) <= nodes:
        tree.add(int(rng.integers(0, len(tree))), int(rng.integers(0, VOCABULARY)), -1.0)
    return tree


def rows_of(tree: TokenTree, start: int) -> Rows:
    """Returns rows for the root and all nodes after a prefix of `start` tokens."""
    n = len(tree)
    visible = np.zeros((n, n), dtype=np.bool_)
    visible[:, 0] = True
    visible[1:, 1:] = tree.ancestor_mask(range(1, n))
    return Rows(np.array(tree.token), start + np.array(tree.depth), start, visible)


def plain(model: HFModel, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model.module(
            input_ids=torch.tensor([[int(token) for token in tokens]]), use_cache=False
        ).logits[0]
        return logits


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


def begun(model: HFModel) -> KVCache:
    """Returns a cache of PROMPT without its last token."""
    kv = model.new_cache()
    prefill(model, kv, PROMPT[:-1])
    return kv


@families
def test_a_row_of_a_tree_equals_its_path_alone(family: str) -> None:
    model, tree = hf_model(family), grown(12)
    assert max(tree.depth) >= 3
    kv = begun(model)
    logits = model.forward(kv, rows_of(tree, kv.length))
    for node in range(len(tree)):
        close(logits[node], plain(model, [*PROMPT, *tree.tokens_to(node)])[-1])


@families
def test_a_second_generation_of_rows_sees_its_own_branch_in_the_cache(family: str) -> None:
    model, kv = hf_model(family), begun(hf_model(family))
    close(
        model.forward(
            kv,
            Rows(
                np.array([PROMPT[-1], 4, 5]),
                np.array([9, 10, 10]),
                9,
                np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], np.bool_),
            ),
        ),
        torch.stack([plain(model, [*PROMPT, *path])[-1] for path in ([], [4], [5])]),
    )
    below = np.array([[1, 1, 0, 1, 0], [1, 0, 1, 0, 1]], np.bool_)
    close(
        model.forward(kv, Rows(np.array([6, 7]), np.array([11, 11]), 9, below)),
        torch.stack([plain(model, [*PROMPT, *path])[-1] for path in ([4, 6], [5, 7])]),
    )
    kv.keep(10, [11, 13])
    close(model.forward(kv, causal(np.array([8]), 12))[0], plain(model, [*PROMPT, 5, 7, 8])[-1])
    kv.keep(11, [])
    kv.truncate(10)
    close(model.forward(kv, causal(np.array([4, 6]), 10)), plain(model, [*PROMPT, 4, 6])[-2:])


@families
def test_greedy_steps_are_those_of_transformers(family: str) -> None:
    model = hf_model(family)
    expected = model.module.generate(
        torch.from_numpy(PROMPT[None]),
        attention_mask=torch.ones((1, 10), dtype=torch.int64),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
    )[0, 10:].tolist()
    kv = model.new_cache()
    found = [int(prefill(model, kv, PROMPT).argmax())]
    while len(found) < 24:
        found.append(int(model.forward(kv, causal(np.array(found[-1:]), kv.length)).argmax()))
    assert found == expected
    assert len(set(found)) >= 4, "the tiny model is too dull to test anything with"


@families
def test_prefill_in_pieces_equals_prefill_at_once(family: str) -> None:
    model, expected = hf_model(family), plain(hf_model(family), PROMPT.tolist())
    pieces, whole = model.new_cache(), model.new_cache()
    close(prefill(model, pieces, PROMPT, chunk=3), expected[-1:])
    close(model.forward(whole, causal(PROMPT, 0)), expected)
    for layer in whole.layers:
        for place in layer.places:
            torch.testing.assert_close(
                pieces.plane(*place), whole.plane(*place), atol=TOLERANCE, rtol=0
            )


@families
def test_logits_of_a_row_do_not_depend_on_the_width_of_the_pass(family: str) -> None:
    model, kv = hf_model(family), begun(hf_model(family))
    rows = Rows(np.arange(16), np.full(16, 9), 9, np.eye(16, dtype=np.bool_))
    wide = model.forward(kv, rows)
    for row in range(16):
        kv.truncate(9)
        close(model.forward(kv, causal(np.array([row]), 9))[0], wide[row])


@pytest.mark.parametrize(("last", "count"), [(None, 4), (0, 0), (1, 1), (3, 3), (4, 4), (9, 4)])
def test_only_the_requested_logits_are_computed(last: int | None, count: int) -> None:
    model: Model = hf_model("llama")
    kv = model.new_cache()
    logits = model.forward(kv, causal(PROMPT[:4], 0), last)
    assert logits.shape == (count, VOCABULARY)
    close(logits, plain(hf_model("llama"), PROMPT[:4].tolist())[4 - count :])
    assert kv.length == 4


def test_model_attributes() -> None:
    model = hf_model("gemma2")
    assert (model.name, model.vocabulary, model.context) == ("gemma2", VOCABULARY, 512)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (causal(np.array([3, VOCABULARY]), 0), "token id outside the vocabulary of 96"),
        (causal(np.array([-1]), 0), "token id outside"),
        (
            Rows(np.array([3]), np.array([512]), 0, np.ones((1, 1), np.bool_)),
            "position 512 is beyond the context of 512",
        ),
    ],
)
def test_rows_outside_of_the_model(rows: Rows, message: str) -> None:
    model = hf_model("gpt2")
    kv = model.new_cache()
    with pytest.raises(InvalidRequest, match=message):
        model.forward(kv, rows)
    assert kv.length == 0


def test_a_pass_that_fails_leaves_the_cache_as_it_was() -> None:
    model = HFModel(FAMILIES["llama"](), "llama")
    kv = begun(model)

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    with (
        model.module.lm_head.register_forward_pre_hook(broken),
        pytest.raises(RuntimeError, match="out of memory"),
    ):
        model.forward(kv, causal(PROMPT[-1:], 9))
    assert kv.length == 9
    close(model.forward(kv, causal(PROMPT[-1:], 9)), plain(model, PROMPT.tolist())[-1:])


def test_a_cache_of_another_kind() -> None:
    class Other:
        length = 0

        def append(self, rows: int) -> int:
            return rows

        @property
        def room(self) -> int:
            return 0

        def keep(self, prefix: int, slots: object) -> None: ...

        def fork(self, length: int) -> "Other":
            return self

        def truncate(self, length: int) -> None: ...

    with pytest.raises(TypeError, match="Other"):
        hf_model("llama").forward(Other(), causal(PROMPT, 0))


def three(model: HFModel) -> list[PassInput]:
    """Returns texts of different lengths with rows to read: a tree, one row, and plain text."""
    parts = []
    for length, rows, last in ((4, None, None), (9, 1, None), (0, 12, 2), (7, 3, 0)):
        text = np.random.default_rng(length).integers(0, VOCABULARY, 20)
        kv = model.new_cache()
        model.forward(kv, causal(text[:length], 0), last=0) if length else None
        read = (
            rows_of(grown(7), length)
            if rows is None
            else causal(text[length : length + rows], length)
        )
        parts.append(PassInput(kv, read, last))
    return parts


@families
def test_several_texts_in_one_pass(family: str) -> None:
    model = hf_model(family)
    apart = [model.forward(part.cache, part.rows, part.last) for part in three(model)]
    parts = three(model)
    packed = model.forward_all(parts)
    assert [len(logits) for logits in packed] == [8, 1, 2, 0]
    for found, expected in zip(packed, apart, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    more = model.forward_all(
        [PassInput(part.cache, causal(np.array([5]), part.cache.length)) for part in parts[1:3]]
    )
    text = np.random.default_rng(9).integers(0, VOCABULARY, 20)
    close(more[0], plain(model, [*text[:10], 5])[-1:])
    assert [part.cache.length for part in parts] == [12, 11, 13, 10]


@families
def test_one_pass_is_one_pass(family: str) -> None:
    """Several texts are one pass of transformers' module, but for Falcon.

    Falcon does not call attention through the interface."""
    model = HFModel(FAMILIES[family](), family)
    assert model.generic.can_pack == (family != "falcon")
    parts, passes = three(model), []
    with model.module.register_forward_hook(lambda *_: passes.append(1)):
        model.forward_all(parts)
    assert len(passes) == (4 if family == "falcon" else 1)
    assert model.module.config._attn_implementation in ("sdpa", "eager")


def test_a_module_that_fails_on_packed_texts_reads_them_one_by_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In this module each row attends only to itself."""
    module = FAMILIES["llama"]()
    with caplog.at_level(logging.WARNING), pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            AttentionInterface._global_mapping,
            ATTENTION_NAME,
            lambda module, query, key, value, mask, **_: (
                value.transpose(1, 2).repeat(1, 1, 2, 1),
                None,
            ),
        )
        model = HFModel(module, "own way")
    assert not model.generic.can_pack
    assert (
        "model own way reads several texts one by one: in one pass its logits are off by"
        in caplog.text
    )
    assert [len(logits) for logits in model.forward_all(three(model))] == [8, 1, 2, 0]


def test_no_texts() -> None:
    assert hf_model("llama").forward_all([]) == []
    assert HFModel(FAMILIES["gpt2"](), "gpt2").forward_all([]) == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_an_error_in_one_text_leaves_all_caches_as_they_were(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = HFModel(FAMILIES[family](), family)
    if family == "llama":
        enable_fast_path(model)
    parts = three(model)
    lengths = [part.cache.length for part in parts]
    bad = PassInput(model.new_cache(), causal(np.array([VOCABULARY]), 0))
    full = model.new_cache()
    full.append(full.capacity)
    for culprit in (
        bad,
        PassInput(
            full, Rows(np.array([1]), np.array([0]), full.capacity, np.ones((1, 1), np.bool_))
        ),
    ):
        with pytest.raises(InvalidRequest):
            model.forward_all([*parts, culprit])
        assert [part.cache.length for part in parts] == lengths
    step = model.step

    def broken(parts: Sequence[PassInput]) -> list[torch.Tensor]:
        step(parts)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "step", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.forward_all(parts)
    assert [part.cache.length for part in parts] == lengths


def test_an_error_in_a_pass_over_several_texts_leaves_the_module_as_it_was() -> None:
    model = HFModel(FAMILIES["gpt2"](), "gpt2")

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    with (
        model.module.lm_head.register_forward_pre_hook(broken),
        pytest.raises(RuntimeError, match="out of memory"),
    ):
        model.forward_all(three(model))
    assert model.module.config._attn_implementation == "sdpa"


def test_nothing_to_prefill() -> None:
    model = hf_model("llama")
    with pytest.raises(InvalidRequest, match="empty"):
        prefill(model, model.new_cache(), np.zeros(0, dtype=np.int64))


@families
def test_every_family_passes_the_rollback_check(family: str) -> None:
    assert check_rollback(hf_model(family)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3"])
def test_low_precision(family: str, dtype: torch.dtype) -> None:
    model = HFModel(FAMILIES[family]().to(dtype), family)
    assert check_rollback(model) < 0.05
    kv = model.new_cache()
    assert model.forward(kv, causal(PROMPT, 0)).dtype == torch.float32
    assert {kv.plane(*place).dtype for layer in kv.layers for place in layer.places} == {dtype}
