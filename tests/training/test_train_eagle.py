"""EAGLE learns on what it will see: the target's states once, then its own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from runtime.core.errors import InvalidRequest
from runtime.models.eagle import Eagle, EagleShape, read_eagle
from runtime.models.head_checkpoint import target_identity
from tests.support import learner
from tests.support.pair import save_model
from training import eagle, features, prompts
from training.acceptance import measure_acceptance
from training.eagle_run import EagleData, train_eagle
from training.features import groups_by_length, open_features
from training.folder import FINISHED, open_work
from training.progress import ProgressBar
from training.teacher import Teacher, load_teacher

LAYERS = [0, 1, 3]
SETTINGS = {"layers": LAYERS, "intermediate": 32, "draft_vocabulary": 64, "unroll": 3}
TEXTS = [tuple(row.tolist()) for row in learner.rows(4, batch=6, context=20)]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("train") / "target", num_hidden_layers=3, context=64)


@pytest.fixture(scope="module")
def teacher(target: Path) -> Teacher:
    return load_teacher(str(target), "cpu")


def made(layers: int = 3) -> Eagle:
    torch.manual_seed(0)
    return Eagle(16, EagleShape(tuple(range(layers)), 24, 4, 2, 8, 1e4, 1e-5, 10))


def one_by_one(module: Eagle, embeddings: Tensor, taps: Tensor, start: int, steps: int) -> Tensor:
    """The states (steps, d) of a drafter that has read the text up to token start + 1, and goes on
    over the true tokens with its own states."""
    given = module.fuse(taps[: start + 1])
    states: list[Tensor] = []
    for step in range(steps):
        fed = torch.cat([given, *(state[None] for state in states)])
        n = len(fed)
        q, k, v = module.project(embeddings[1 : n + 1], fed, torch.arange(1, n + 1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        states.append(module.finish(fed, attended)[-1])
        assert n == start + 1 + step
    return torch.stack(states)


def test_unrolled_steps_are_those_of_a_drafter_that_goes_on_alone() -> None:
    module, embeddings, taps = made(), torch.randn(1, 12, 16), torch.randn(1, 12, 48)
    starts = torch.tensor([0, 3, 7])
    texts = torch.zeros(1, 12, dtype=torch.long)
    first, *later = eagle.unroll(module, embeddings, taps, texts, starts, 4)
    assert first.shape == (1, 11, 16)
    for number, start in enumerate(starts.tolist()):
        alone = one_by_one(module, embeddings[0], taps[0], start, 4)
        together = torch.stack([first[0, start], *(state[0, number] for state in later)])
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_a_text_sees_no_other() -> None:
    module, embeddings, taps = made(), torch.randn(1, 9, 16), torch.randn(1, 9, 48)
    texts = torch.tensor([[4, 4, 4, 5, 5, 5, 5, 5, 5]])
    together = eagle.unroll(module, embeddings, taps, texts, torch.tensor([4]), 3)
    alone = eagle.unroll(module, embeddings[:, 3:], taps[:, 3:], texts[:, 3:], torch.tensor([1]), 3)
    torch.testing.assert_close(together[0][:, 3:], alone[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together[1:], alone[1:], atol=1e-4, rtol=1e-4)


def test_features_are_the_targets_states_whatever_the_lengths(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "fast_copy", lambda teacher: teacher.module)
    texts = [TEXTS[0][:7], TEXTS[1], TEXTS[2][:12]]
    told: list[int] = []
    found = open_features(teacher, LAYERS, texts, tmp_path, told.append)
    assert sum(told) == 3
    assert found.tokens.tolist() == [token for text in texts for token in text]
    assert found.texts.tolist() == [0] * 7 + [1] * 20 + [2] * 12
    seen = teacher.states(torch.tensor([TEXTS[1]]))
    torch.testing.assert_close(found.last[7:27], seen.last[0].bfloat16())
    taps = found.taps[7:27].unflatten(-1, (3, -1))
    for number, layer in enumerate(LAYERS[:2]):
        torch.testing.assert_close(taps[:, number], seen.layers[layer][0].bfloat16())
    final = teacher.module.model.norm(taps[:, 2].float())  # the last tap is before the final norm
    torch.testing.assert_close(final, seen.last[0], atol=0.05, rtol=0.05)
    monkeypatch.setattr(features, "read_group", None)  # not needed again
    again = open_features(teacher, LAYERS, texts, tmp_path, told.append)
    assert torch.equal(again.taps, found.taps)


def test_texts_are_read_in_groups_that_fit_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "BATCH_TOKENS", 10)
    assert groups_by_length([3, 3, 3, 4, 30, 1, 1], 0) == [[0, 1, 2], [3], [4], [5, 6]]
    assert groups_by_length([3, 3, 3, 4, 30, 1, 1], 5) == [[5, 6]]
    assert groups_by_length([3, 3], 2) == []


def test_the_loss_falls(teacher: Teacher, tmp_path: Path) -> None:
    known = open_features(teacher, LAYERS, TEXTS, tmp_path, lambda count: None)
    tokens = eagle.frequent_tokens(known.tokens, 64)
    module = eagle.new_eagle(teacher, LAYERS, 32, tokens, 0)
    scales = eagle.tap_scales(known.taps, 3)
    loss = eagle.distillation(teacher, module, known, scales, 24, 3)
    windows = eagle.window_starts(len(known.tokens), 24, 2, 0)
    learned = torch.optim.AdamW(module.parameters(), 3e-3)
    values = []
    for step in range(40):
        torch.manual_seed(step)
        value = loss(windows(step % 2), 0.0)
        value.backward()
        values.append(float(value.detach()))
        learned.step()
        learned.zero_grad()
    assert 0.0 < sum(values[-4:]) < 0.9 * sum(values[:4])


def test_windows_cover_the_texts_in_another_order_each_epoch() -> None:
    starts = eagle.window_starts(100, 10, 3, 5)
    first, second = ([starts(step) for step in range(at, at + 3)] for at in (0, 3))
    assert len({int(start) for batch in first for start in batch}) == 9
    assert torch.equal(torch.stack(first), torch.stack([starts(step) for step in range(3)]))
    assert not torch.equal(torch.stack(first), torch.stack(second))
    assert all(0 <= int(start) <= 90 for batch in (*first, *second) for start in batch)


def test_scales_move_into_the_weights(teacher: Teacher) -> None:
    module, taps = made(), torch.randn(5, 48) * torch.tensor([1.0, 8.0, 50.0]).repeat_interleave(16)
    scales = eagle.tap_scales(taps, 3)
    expected = module.fuse(taps / scales.repeat_interleave(16))
    eagle.scale_taps(module, scales)
    torch.testing.assert_close(module.fuse(taps), expected)


def test_the_draft_vocabulary_is_the_most_frequent_tokens() -> None:
    assert eagle.frequent_tokens(torch.tensor([9, 3, 3, 7, 7, 7, 1]), 2).tolist() == [3, 7]
    assert eagle.frequent_tokens(torch.tensor([9, 3, 3]), 5).tolist() == [3, 9]


def test_a_training_leaves_a_checkpoint_and_a_card(
    teacher: Teacher, target: Path, tmp_path: Path
) -> None:
    order = learner.order(tmp_path / "out", target, "eagle", SETTINGS)
    held_out = {"own": learner.written(teacher), "given": learner.written(teacher, 3)}
    with open_work(order.out, order.recipe("", "")) as work, ProgressBar() as bar:
        measured = train_eagle(order, EagleData(teacher, TEXTS, held_out, ""), work, bar)
        assert not (work / FINISHED).exists()
    assert not order.out.with_name("out.partial").exists()
    module = read_eagle(order.out, target_identity(teacher.module.config, teacher.tokenizer))
    assert module.shape.layers == tuple(LAYERS)
    assert module.fuse.weight.dtype == torch.bfloat16
    card = (order.out / "README.md").read_text()
    assert "EAGLE drafter for target" in card
    assert "## Acceptance: given" in card
    assert "64 tokens, which are" in card
    assert list(measured) == ["own", "given"]
    guess = eagle.eagle_guesser(teacher, module.float(), 4)
    assert measure_acceptance(held_out["own"], guess, 2) == measured["own"]
    figures = json.loads((order.out / "training.json").read_text())
    assert len(figures["losses"]) == 3
    assert len(figures["acceptance"][0]["positions"]) == 4


def test_too_few_texts_are_refused(teacher: Teacher, target: Path, tmp_path: Path) -> None:
    order = learner.order(tmp_path / "out", target, "eagle", SETTINGS)
    with (
        open_work(order.out, order.recipe("", "")) as work,
        ProgressBar() as bar,
        pytest.raises(InvalidRequest, match="20 tokens to learn from"),
    ):
        train_eagle(order, EagleData(teacher, TEXTS[:1], {}, ""), work, bar)


def test_tokens_outside_of_the_draft_vocabulary_are_not_guessed(teacher: Teacher) -> None:
    answers = learner.written(teacher)
    module = eagle.new_eagle(teacher, LAYERS, 32, torch.arange(4096), 0)
    whole = eagle.eagle_guesser(teacher, module, 2)(answers[0].prompt + answers[0].output, 4)
    module.draft_tokens = module.draft_tokens[:10]
    part = eagle.eagle_guesser(teacher, module, 2)(answers[0].prompt + answers[0].output, 4)
    assert whole.shape == part.shape == (2, learner.CONTEXT - 4, 4096)
    rows = learner.CONTEXT - 4 - 3  # the last ones guess beyond the text
    torch.testing.assert_close(part[:, :rows, :10], whole[:, :rows, :10])
    assert bool(part[:, :, 10:].isinf().all())


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (lambda file: file.write_text(""), "no prompts"),
        (lambda file: file.write_text('{"prompt": ""}\n'), ":1 has no prompt"),
        (lambda file: file.write_text('{"prompt": "a"}\n[1]\n'), ":2 has no prompt"),
        (lambda file: file.write_text("{"), ":1 has no prompt"),
        (lambda file: file.unlink(missing_ok=True), "cannot read"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(
    tmp_path: Path, written: Callable[[Path], None], says: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    written(file)
    with pytest.raises(InvalidRequest, match=says):
        prompts.read_prompts(file)


def test_prompts_are_the_first_turns(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"turns": ["a", "b"]}\n{"prompt": "c"}\n')
    assert prompts.read_prompts(file) == ["a", "c"]
    assert prompts.spread(list("abcdefgh"), 4) == list("aceg")
    assert prompts.spread(["a"], 4) == ["a"]
