"""In bfloat16, speculation and plain decoding differ only at undecided tokens."""

import pytest

from experiments.divergence import Divergence, first_divergence
from runtime.draft.draft_engine import DraftEngine
from runtime.drafters.model import ModelDrafter
from runtime.model_paths import bundled_model
from runtime.models.loader import load_model, load_tokenizer
from runtime.models.sampler import choose
from tests.support.harness import Lockstep, asking, engine_of, plain

PROMPTS = (
    "import os\nimport sys\n",
    "class Stack:\n    def __init__(self",
    "def read(path):\n",
    "for name in sorted(",
    "@property\ndef ",
)


@pytest.mark.slow
def test_texts_of_bfloat16_differ_at_near_ties_alone() -> None:
    target, draft = (
        load_model(bundled_model(name), "bfloat16", "cpu", 1) for name in ("target", "draft")
    )
    tokenizer, lengths = load_tokenizer(bundled_model("target")), []
    for text in PROMPTS:
        request = asking(tokenizer.encode(text), max_tokens=40)
        (guessed,) = Lockstep(
            engine_of(target, 8, chooser=choose), DraftEngine(ModelDrafter(draft), "d", 4)
        ).run(request)
        alone = plain(target, request, chooser=choose)
        assert guessed.stats.accepted > 0
        found = first_divergence(target, request.prompt, guessed.tokens, alone.tokens)
        assert found is None or found.near_tie, found
        lengths.append(len(guessed.tokens) if found is None else found.place)
    assert sum(lengths) > 40


def test_a_difference_without_a_tie_is_seen() -> None:
    model = load_model(bundled_model("draft"), "float32", "cpu", 1)
    tokens = plain(model, asking((5, 6, 7), max_tokens=6), chooser=choose).tokens
    assert first_divergence(model, (5, 6, 7), tokens, tokens) is None
    assert first_divergence(model, (5, 6, 7), tokens, tokens[:3]) is None
    found = first_divergence(model, (5, 6, 7), tokens, (*tokens[:4], tokens[4] + 1, tokens[5]))
    assert found is not None
    assert (found.place, found.tokens) == (4, (tokens[4], tokens[4] + 1))
    assert found.logits[0] > found.logits[1]


def test_distance_is_counted_in_steps_of_numbers_of_that_size() -> None:
    assert Divergence(0, (1, 2), (9.0, 9.0 - 8 * 2.0**-7)).steps == pytest.approx(1.0)
    assert Divergence(0, (1, 2), (-0.5, -0.5)).steps == 0.0
    assert not Divergence(0, (1, 2), (9.0, 8.0)).near_tie  # 16 steps
