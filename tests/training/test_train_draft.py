"""Draft models: the shape that a budget allows, losses that train, folders that load."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runtime.core.errors import InvalidRequest
from tests.support.learner import material, order, rows
from tests.support.pair import save_model
from training import draft, folder, shapes
from training.loss_kind import LossKind
from training.run import check_context, train_draft
from training.teacher import Teacher, load_teacher


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("train") / "target", num_hidden_layers=3, context=64)


@pytest.fixture(scope="module")
def teacher(target: Path) -> Teacher:
    return load_teacher(str(target), "cpu")


# Drafts


@pytest.mark.parametrize("goal", LossKind)
def test_every_loss_trains_a_draft_that_the_runtime_loads(
    teacher: Teacher, target: Path, tmp_path: Path, goal: LossKind
) -> None:
    from runtime.models.loader import load_model, load_tokenizer

    out, shape = tmp_path / "out", shapes.DraftShape(64, 1)
    asked = order(out, target, "draft", {"loss": goal}, steps=4)
    module = draft.new_draft(shape, teacher, seed=0)
    times = {shape: {1: 0.001, 4: 0.002}}
    with folder.open_work(out, asked.recipe("f", "d")) as work:
        train_draft(asked, material(teacher), module, goal, times, work, lambda done, loss: None)
    assert load_model(str(out), "float32", "cpu").vocabulary == teacher.model.vocabulary
    assert load_tokenizer(str(out)).get_vocab() == teacher.tokenizer.get_vocab()
    assert load_file(out / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert "| 1 | 64 |" in (out / "README.md").read_text()


def test_a_draft_goes_on_from_another_and_tvd_begins_with_kl(
    teacher: Teacher, target: Path
) -> None:
    module, tokens = draft.load_start(str(target), torch.device("cpu")), rows()
    values = {
        (goal, done): float(draft.distillation(teacher, module, goal)(tokens, done).detach())
        for goal in LossKind
        for done in (0.0, 0.9)
    }
    assert (
        values[LossKind.kl, 0.0]
        == values[LossKind.tvd, 0.0]
        == values[LossKind.tvd_plus_plus, 0.0]
        == pytest.approx(0.0, abs=1e-5)
    )
    assert values[LossKind.tvd, 0.9] == pytest.approx(0.0, abs=1e-5)
    assert values[LossKind.next_token, 0.0] == values[LossKind.next_token, 0.9] > 1.0


def test_what_a_draft_knows_already_is_changed_gently() -> None:
    fresh, gentle = draft.draft_settings(9, 1, fresh=True), draft.draft_settings(9, 1, fresh=False)
    assert gentle.matrix_rate == pytest.approx(0.1 * fresh.matrix_rate)
    assert gentle.other_rate == pytest.approx(0.1 * fresh.other_rate)
    assert (gentle.steps, gentle.seed, gentle.decay) == (9, 1, fresh.decay)


def by_parameters(shape: shapes.DraftShape) -> shapes.Times:
    """A machine on which a layer costs 0.1 ms and a million parameters 1 ms."""
    return {rows: shape.layers * 1e-4 + shape.parameters(1000) * 1e-9 for rows in shapes.WIDTHS}


def test_the_shallowest_of_the_largest_shapes_within_the_budget_is_proposed() -> None:
    chosen, curve = shapes.propose_shape(3e-3, 1000, by_parameters)
    assert by_parameters(chosen)[shapes.BUDGET_ROWS] <= 3e-3
    assert chosen.layers == 2
    assert (
        by_parameters(shapes.DraftShape(chosen.hidden + shapes.HIDDEN_STEP, chosen.layers))[
            shapes.BUDGET_ROWS
        ]
        > 3e-3
    )
    assert next(iter(curve)) == chosen
    assert len(curve) >= 4
    sizes = [shape.parameters(1000) for shape in curve]
    assert max(sizes) < 1.6 * min(sizes)


def test_a_budget_that_nothing_fits_into_is_refused() -> None:
    with pytest.raises(
        InvalidRequest,
        match=r"latency 0.01 ms is less than the smallest shape takes here \(0.37 ms\): raise it",
    ):
        shapes.propose_shape(1e-5, 1000, by_parameters)


def test_a_proposal_is_measured_once(tmp_path: Path) -> None:
    first = draft.settle_shape(tmp_path, 3e-3, 1000, by_parameters)
    assert (
        draft.settle_shape(tmp_path, 3e-3, 1000, lambda shape: pytest.fail("measured again"))
        == first
    )


def test_shapes_are_what_they_are_said_to_be(teacher: Teacher) -> None:
    shape = shapes.DraftShape(128, 2)
    module = draft.new_draft(shape, teacher, 0)
    matrices = {
        parameter.data_ptr(): parameter.numel()
        for parameter in module.parameters()
        if parameter.ndim == 2
    }
    assert sum(matrices.values()) == shape.parameters(4096)
    measured = shapes.make_measure(4096, torch.device("cpu"))(shapes.DraftShape(64, 1))
    assert set(measured) == set(shapes.WIDTHS)
    assert all(seconds > 0 for seconds in measured.values())


def test_a_context_must_be_one_that_the_target_reads() -> None:
    assert check_context(64, 64) == 64
    for wrong in (15, 65):
        with pytest.raises(InvalidRequest, match="this target reads 16 to 64 tokens"):
            check_context(wrong, 64)


@pytest.mark.parametrize("budget", [0.0004, 0.001, 0.01, 0.1, 10.0])
def test_the_widest_that_fits_is_found_without_making_much_wider_ones(budget: float) -> None:
    seen: list[int] = []

    def measure(shape: shapes.DraftShape) -> shapes.Times:
        seen.append(shape.hidden)
        return by_parameters(shape)

    fitting = [
        shapes.DraftShape(hidden, 2)
        for hidden in range(shapes.HIDDEN_STEP, shapes.MAX_HIDDEN + 1, shapes.HIDDEN_STEP)
    ]
    expected = max(
        (shape.hidden for shape in fitting if by_parameters(shape)[shapes.BUDGET_ROWS] <= budget),
        default=None,
    )
    found = shapes.widest_within(budget, 2, measure)
    assert (found and found[0].hidden) == expected
    assert max(seen) <= 2 * (expected or shapes.HIDDEN_STEP)
    assert len(seen) <= 13
