"""Heads compared with the same tree: counted, and the same each time."""

from bench.core.prompts import held_out
from bench.methods.study import LEARNING, NEW_TOKENS
from experiments.same_tree import Counted, counted, grid, page
from runtime.model_paths import bundled_model
from runtime.models.loader import load_model, load_tokenizer


def test_what_is_counted_does_not_depend_on_the_clock() -> None:
    shipped = bundled_model("target")
    model, prompts = (
        load_model(shipped, "float32", "cpu", 1),
        held_out(load_tokenizer(shipped), LEARNING + 1, 2),
    )
    found = [counted(model, "medusa", 0.0, rows, prompts) for rows in (0, 4, 4)]
    assert [one.tokens for one in found] == [NEW_TOKENS] * 3
    assert found[0].tokens_per_step == 1.0
    assert found[1] == found[2]
    assert found[1].tokens_per_step > 1.2


def test_a_line_for_each_head_and_temperature() -> None:
    all_ = [
        Counted("a", 0.0, 4, 30, 20),
        Counted("a", 0.0, 8, 40, 20),
        Counted("b", 0.8, 8, 50, 20),
    ]
    assert grid(all_).rows == (("0", "a", "1.50", "2.00", "-"), ("0.8", "b", "-", "2.50", "-"))
    assert "| 0.8 | b | - | 2.50 | - |" in page(all_, 7)
    assert "7 held-out prompts" in page(all_, 7)
