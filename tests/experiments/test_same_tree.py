"""Heads compared with the same tree: counted, and the same each time."""

from bench.core.prompts import held_out_prompts
from bench.methods.study import LEARNING_PROMPTS, NEW_TOKENS
from experiments.same_tree import StepCount, count_steps, results_grid, results_page
from runtime.model_paths import bundled_model
from runtime.models.loader import load_model, load_tokenizer


def test_what_is_counted_does_not_depend_on_the_clock() -> None:
    shipped = bundled_model("target")
    model, prompts = (
        load_model(shipped, "float32", "cpu", 1),
        held_out_prompts(load_tokenizer(shipped), LEARNING_PROMPTS + 1, 2),
    )
    found = [count_steps(model, "medusa", 0.0, rows, prompts) for rows in (0, 4, 4)]
    assert [one.tokens for one in found] == [NEW_TOKENS] * 3
    assert found[0].tokens_per_step == 1.0
    assert found[1] == found[2]
    assert found[1].tokens_per_step > 1.2


def test_a_line_for_each_head_and_temperature() -> None:
    all_ = [
        StepCount("a", 0.0, 4, 30, 20),
        StepCount("a", 0.0, 8, 40, 20),
        StepCount("b", 0.8, 8, 50, 20),
    ]
    assert results_grid(all_).rows == (
        ("0", "a", "1.50", "2.00", "-"),
        ("0.8", "b", "-", "2.50", "-"),
    )
    assert "| 0.8 | b | - | 2.50 | - |" in results_page(all_, 7)
    assert "7 held-out prompts" in results_page(all_, 7)
