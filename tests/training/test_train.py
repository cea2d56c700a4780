"""Training is bit-for-bit repeatable, resumable and atomic; its losses match the formulas."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from runtime.core.errors import InvalidRequest
from runtime.models.loader import load_tokenizer
from tests.support.learner import CONTEXT, documents, rows
from tests.support.pair import SHIPPED
from training import folder, losses, text
from training.loop import TrainingSettings, is_matrix, learning_rate_at, smooth, train


def logits(seed: int, rows: int = 5, vocabulary: int = 7) -> Tensor:
    return torch.randn(
        rows, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


# Losses


def test_losses_are_what_their_formulas_say() -> None:
    guess, truth = logits(0), logits(1)
    q, p = guess.softmax(-1).numpy(), truth.softmax(-1).numpy()
    assert float(losses.forward_kl(guess, truth)) == pytest.approx(
        float((p * np.log(p / q)).sum(axis=1).mean())
    )
    assert float(losses.tvd(guess, truth)) == pytest.approx(
        float(1 - np.minimum(p, q).sum(axis=1).mean())
    )
    tokens = torch.tensor([0, 6, 2, 2, 1])
    assert float(losses.next_token(guess, tokens)) == pytest.approx(
        float(-np.log(q[range(5), tokens]).mean())
    )


@pytest.mark.parametrize("distance", [losses.forward_kl, losses.tvd])
def test_equal_distributions_are_at_no_distance(distance: losses.Distance) -> None:
    assert float(distance(logits(0), logits(0) + 3.0)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("distance", [losses.forward_kl, losses.tvd])
def test_gradients_are_those_of_small_differences(distance: losses.Distance) -> None:
    truth = logits(1)
    assert torch.autograd.gradcheck(
        lambda guess: distance(guess, truth), logits(0).requires_grad_()
    )


def test_tvd_plus_plus_is_the_policy_gradient_of_the_tvd_over_the_rewards_deviation() -> None:
    guess, truth = logits(0).requires_grad_(), logits(1)
    (plain,) = torch.autograd.grad(losses.tvd(guess, truth), guess)
    (normalised,) = torch.autograd.grad(losses.tvd_plus_plus(guess, truth), guess)
    q = guess.detach().softmax(-1)
    mean = float((q * (truth.softmax(-1) > q)).sum(-1).mean())
    torch.testing.assert_close(normalised * math.sqrt(mean * (1 - mean)), plain)


def test_tvd_plus_plus_sums_what_sampling_would_estimate() -> None:
    guess, truth = logits(0, rows=1).requires_grad_(), logits(1, rows=1)
    (exact,) = torch.autograd.grad(losses.tvd_plus_plus(guess, truth), guess)
    q, p = guess.detach().softmax(-1)[0], truth.softmax(-1)[0]
    reward = (p > q).double()
    mean = (q * reward).sum()
    advantage = (reward - mean) / (mean * (1 - mean)).sqrt()
    by_token = (
        torch.eye(7, dtype=torch.float64) - q
    )  # gradient of log q(x) in the logits, for each x
    torch.testing.assert_close(exact[0], -(q * advantage) @ by_token)


# The loop


class Line(nn.Module):
    """A matrix and a vector: one parameter for each optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)


def line() -> Line:
    torch.manual_seed(0)
    return Line()


def learn(
    checkpoint: Path, steps: int, seen: list[int], stop: int | None = None
) -> tuple[Line, list[float]]:
    """`stop`: interrupted as by Ctrl-C when so many steps are done."""
    module = line()

    def loss(rows: Tensor, done: float) -> Tensor:
        x = torch.randn(3, 4)  # a step's own randomness must come back too
        off: Tensor = module.linear(x) - x.flip(-1)
        return off.square().mean() + 0 * rows.sum() + 0 * done

    def tell(done: int, value: float) -> None:
        seen.append(done)
        if done == stop:
            raise KeyboardInterrupt

    found = train(module, loss, rows, TrainingSettings(steps, seed=3, decay=0.05), checkpoint, tell)
    return module, found


def test_an_interrupted_training_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.loop.CHECKPOINT_EVERY", 4)
    through, expected = learn(tmp_path / "a", 12, [])
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "b", 12, [], stop=10)
    seen: list[int] = []
    again, got = learn(tmp_path / "b", 12, seen)
    assert seen == list(range(8, 13))
    assert got == expected
    for name, parameter in through.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_a_training_learns(tmp_path: Path) -> None:
    module, x = line(), torch.eye(4)
    found = train(
        module,
        lambda rows, done: (module.linear(x) - x).square().mean(),
        rows,
        TrainingSettings(40),
        tmp_path / "a",
        lambda done, loss: None,
    )
    assert len(found) == 40
    assert found[-1] < 0.5 * found[0]


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    learn(tmp_path / "a", 3, [])
    seen: list[int] = []
    assert len(learn(tmp_path / "a", 3, seen)[1]) == 3
    assert seen == [3]


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04" + 40 * b"x"])
def test_a_checkpoint_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(InvalidRequest, match="is not a checkpoint of this training: remove"):
        learn(tmp_path / "a", 3, [])


def test_a_loss_that_is_no_number_ends_the_training(tmp_path: Path) -> None:
    module = line()
    with pytest.raises(InvalidRequest, match="the loss is nan at step 0"):
        train(
            module,
            lambda rows, done: module.linear.weight.sum() * math.nan,
            rows,
            TrainingSettings(2),
            tmp_path / "a",
            lambda done, loss: None,
        )
    assert not (tmp_path / "a").exists()


def test_the_rate_warms_up_holds_and_falls() -> None:
    rates = [learning_rate_at(step, 100) for step in range(100)]
    assert rates[0] == 0.5
    assert rates[2:60] == [1.0] * 58
    assert rates[65:] == sorted(rates[65:], reverse=True)
    assert rates[-1] == 0.05


def test_embeddings_and_vectors_are_no_matrices() -> None:
    matrix, vector = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    assert is_matrix("layers.0.up.weight", matrix)
    assert not is_matrix("layers.0.up.bias", vector)
    assert not is_matrix("model.embed_tokens.weight", matrix)
    assert not is_matrix("lm_head.weight", matrix)


def test_smoothing_is_a_mean_over_what_came_before() -> None:
    assert smooth([4.0, 2.0, 0.0, 10.0], over=2) == [4.0, 3.0, 1.0, 5.0]


# Texts


def test_one_document_in_twenty_is_held_out_by_its_name_alone() -> None:
    learned, held = text.split_documents(documents(200))
    assert len(learned) + len(held) == 200
    assert 3 <= len(held) <= 20
    assert set(text.split_documents(documents(100))[1]) <= set(held)


def test_of_few_documents_the_ends_are_held_out() -> None:
    learned, held = text.split_documents(
        [text.Document("a", "x" * 95 + "y" * 5), text.Document("b", "")]
    )
    assert (learned, held) == (["x" * 95, ""], ["y" * 5, ""])


def test_files_and_folders_are_read_and_what_is_no_text_is_left_out_of_folders(
    tmp_path: Path,
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "in" / "b.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "in" / ".hidden").write_text("c")
    (tmp_path / "d.txt").write_text("d")
    assert [
        document.name for document in text.read_documents([tmp_path / "in", tmp_path / "d.txt"])
    ] == [
        "a.txt",
        "d.txt",
    ]


def test_bad_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "b.bin").write_bytes(b"ab\xff")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "none").mkdir()
    for paths, message in (
        ([tmp_path / "gone"], r"cannot read .*gone \(No such file"),
        ([tmp_path / "b.bin"], r"b.bin is not UTF-8 \(byte 2\): convert it first"),
        ([tmp_path / "empty.txt"], "no text in .*: give files or folders of UTF-8 text"),
        ([tmp_path / "none"], "no text in .*: give files or folders of UTF-8 text"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            text.read_documents(paths)
    with pytest.raises(InvalidRequest, match="at least 48 to learn from are needed"):
        text.build_corpus(
            [text.Document("a", "short")],
            load_tokenizer(str(SHIPPED)).backend_tokenizer,
            0,
            2 * CONTEXT,
        )


def test_batches_are_a_function_of_seed_and_step() -> None:
    stream, own = np.arange(1000, dtype=np.int32), np.arange(60, dtype=np.int32).reshape(5, 12)

    def batch(seed: int) -> Callable[[int], Tensor]:
        return text.make_batches([text.windows(stream, 12, seed), text.text_rows(own, seed)], 4)

    assert torch.equal(batch(1)(37), batch(1)(37))
    assert not torch.equal(batch(1)(37), batch(2)(37))
    for row in batch(1)(3)[::2]:
        assert torch.equal(row, torch.arange(int(row[0]), int(row[0]) + 12))
    assert {int(row[0]) // 12 for step in range(3) for row in batch(1)(step)[1::2]} == set(
        range(5)
    )  # an epoch holds all of them


def test_an_epoch_of_windows_overlaps_nowhere() -> None:
    window = text.windows(np.arange(130, dtype=np.int32), 12, 0)
    starts = sorted(int(window(index)[0]) for index in range(9))
    assert np.diff(starts).tolist() == [12] * 8


# The folder


def test_a_result_is_there_once_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with folder.open_work(out, {"steps": 1}) as work:
        (work / folder.FINISHED).mkdir()
        folder.write_atomically(work / folder.FINISHED / "a", b"1")
        assert not out.exists()
        folder.publish(work, out)
    assert (out / "a").read_bytes() == b"1"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    with (
        pytest.raises(InvalidRequest, match="out already exists: give another --out"),
        folder.open_work(out, {"steps": 1}),
    ):
        pass


def test_work_under_other_settings_is_refused_and_under_the_same_gone_on_with(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        with folder.open_work(out, {"steps": 1, "layers": (1, 2)}) as work:
            (work / "checkpoint.pt").touch()
    with (
        pytest.raises(
            InvalidRequest, match=r"unfinished work with other settings \(steps was 1 and is 2\)"
        ),
        folder.open_work(out, {"steps": 2, "layers": (1, 2)}),
    ):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_recipe_that_cannot_be_read_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "recipe.json").write_text(content)
    with (
        pytest.raises(InvalidRequest, match="is invalid JSON: remove"),
        folder.open_work(tmp_path / "out", {}),
    ):
        pass


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("years")
    with (
        pytest.raises(InvalidRequest, match=r"contains other files \(thesis.tex\)"),
        folder.open_work(tmp_path / "out", {}),
    ):
        pass
    (tmp_path / "file").touch()
    for taken in (tmp_path / "file", tmp_path):
        with pytest.raises(InvalidRequest, match="already exists"):
            folder.check_out_is_free(taken)


def test_two_trainings_do_not_share_a_folder(tmp_path: Path) -> None:
    with folder.open_work(tmp_path / "out", {}):
        with (
            pytest.raises(InvalidRequest, match="in use by another training"),
            folder.open_work(tmp_path / "out", {}),
        ):
            pass
        assert (tmp_path / "out.partial").is_dir()


def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path: Path) -> None:
    def fill() -> None:
        with folder.open_work(tmp_path / "out", {}) as work:
            folder.write_atomically(work / "checkpoint.pt", b"whole")
            raise OSError(28, "No space left on device")

    with pytest.raises(
        InvalidRequest, match=r"cannot write .*out \(No space left on device\): free space"
    ):
        fill()
    assert (tmp_path / "out.partial" / "checkpoint.pt").read_bytes() == b"whole"
    assert not (tmp_path / "out").exists()
