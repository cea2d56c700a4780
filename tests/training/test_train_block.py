"""A block layer learns on what its drafter computes: all places after a root in one pass."""

from pathlib import Path

import pytest
import torch

from runtime.models.block import Block, BlockShape, read_block
from runtime.models.eagle import EagleShape
from runtime.models.head_checkpoint import target_identity
from tests.support import blocks, eagles, learner
from tests.support.pair import save_model
from training import block, eagle
from training.acceptance import measure_acceptance
from training.eagle_run import EagleData
from training.features import open_features
from training.folder import open_work
from training.progress import ProgressBar
from training.teacher import Teacher, load_teacher

LAYERS = [0, 1, 3]
SETTINGS = {
    "layers": LAYERS,
    "intermediate": 32,
    "draft_vocabulary": 64,
    "places": 3,
    "rank": 4,
}
TEXTS = [tuple(row.tolist()) for row in learner.rows(4, batch=6, context=20)]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("train") / "target", num_hidden_layers=3, context=64)


@pytest.fixture(scope="module")
def teacher(target: Path) -> Teacher:
    return load_teacher(str(target), "cpu")


def made() -> Block:
    torch.manual_seed(0)
    return Block(16, BlockShape(EagleShape((0, 1, 2), 24, 4, 2, 8, 1e4, 1e-5, 10), 4, 3))


def test_guesses_are_those_of_the_drafter() -> None:
    """The same as one pass after another root, place by place, given the true tokens."""
    tiny = blocks.tiny()
    teacher = load_teacher(str(tiny.target), "cpu")
    (text,) = learner.rows(1, 1, 20).tolist()
    found = block.block_guesser(teacher, tiny.block)(text, 3)
    assert found.shape == (blocks.PLACES, 17, 4096)
    assert bool(found[:, :, 1::2].isinf().all())  # the draft tokens are every second one
    for row in (3, 9):
        known = text[: row + 2]
        features = eagles.features_of(eagles.tiny(), known)
        for place in range(blocks.PLACES):
            path = text[row + 2 : row + 2 + place]
            alone = blocks.straight(tiny, features, known, path)
            torch.testing.assert_close(found[place, row - 3, ::2], alone, atol=0.03, rtol=0.03)


def test_a_text_sees_no_other() -> None:
    module, embeddings, taps = made(), torch.randn(1, 9, 16), torch.randn(1, 9, 48)
    texts = torch.tensor([[4, 4, 4, 5, 5, 5, 5, 5, 5]])
    first, after = block.block_states(module, embeddings, taps, texts, torch.tensor([4, 6]))
    alone = block.block_states(
        module, embeddings[:, 3:], taps[:, 3:], texts[:, 3:], torch.tensor([1, 3])
    )
    assert first.shape == (1, 8, 16)
    assert after.shape == (1, 2, 3, 16)
    torch.testing.assert_close((first[:, 3:], after), alone, atol=1e-4, rtol=1e-4)


def test_the_loss_falls_at_all_places(teacher: Teacher, tmp_path: Path) -> None:
    known = open_features(teacher, LAYERS, TEXTS, tmp_path, lambda count: None)
    tokens = eagle.frequent_tokens(known.tokens, 64)
    module = block.new_block(teacher, LAYERS, 32, tokens, 3, 4, 0)
    scales = eagle.tap_scales(known.taps, 3)
    loss = block.distillation(teacher, module, known, scales, 24)
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
    assert bool(module.markov_out.weight.any())  # which began as zero


def test_a_training_leaves_a_checkpoint_and_a_card(
    teacher: Teacher, target: Path, tmp_path: Path
) -> None:
    order = learner.order(tmp_path / "out", target, "block", SETTINGS)
    held_out = {"own": learner.written(teacher)}
    with open_work(order.out, order.recipe("", "")) as work, ProgressBar() as bar:
        measured = block.train_block(order, EagleData(teacher, TEXTS, held_out, ""), work, bar)
    module = read_block(order.out, target_identity(teacher.module.config, teacher.tokenizer))
    assert (module.block_shape.places, module.block_shape.rank) == (3, 4)
    assert "Block drafter for target" in (order.out / "README.md").read_text()
    guess = block.block_guesser(teacher, module.float())
    assert measure_acceptance(held_out["own"], guess, 2) == measured["own"]
    assert len(measured["own"][0].rates) == 3
