"""Heads train on what they will see; acceptance is counted as the runtime would."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from runtime.core.errors import ModelRefused
from runtime.core.sampling_params import SamplingParams
from runtime.heads.hidden_transfer import HiddenTransfer
from runtime.heads.medusa import Medusa
from runtime.models.acceptance import RANKS
from runtime.models.head_checkpoint import read_settings, read_tensors, target_identity
from tests.support.learner import CONTEXT, material, order, rows
from tests.support.pair import save_model
from training import folder, heads, hidden_transfer, medusa, outputs, s3d
from training.acceptance import measure_acceptance
from training.run import train_head
from training.teacher import Teacher, fingerprint, load_teacher


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("train") / "target", num_hidden_layers=3, context=64)


@pytest.fixture(scope="module")
def teacher(target: Path) -> Teacher:
    return load_teacher(str(target), "cpu")


# Heads


def test_training_sees_what_the_target_computes(teacher: Teacher) -> None:
    tokens = rows()
    seen = teacher.states(tokens)
    with torch.no_grad():
        expected = teacher.module(tokens).logits
    assert len(seen.layers) == 3
    torch.testing.assert_close(teacher.unembed(seen.last), expected)


def test_a_target_that_changes_its_logits_behind_the_unembedding_is_refused(target: Path) -> None:
    found = load_teacher(str(target), "cpu")
    unembedding = found.module.lm_head
    unembedding.register_forward_hook(
        lambda module, given, out: out.tanh() if out.ndim == 3 else out
    )
    with pytest.raises(ModelRefused, match="changes its logits after the unembedding"):
        Teacher(found.model, found.tokenizer)


def test_the_files_of_a_target_name_it(target: Path, tmp_path: Path) -> None:
    assert fingerprint(str(target)) == fingerprint(str(target))
    assert fingerprint(str(target)) != fingerprint(str(save_model(tmp_path / "other", seed=1)))


def test_untrained_medusa_heads_say_what_the_target_says_of_the_next_place(
    teacher: Teacher,
) -> None:
    tokens, made = rows(), Medusa(teacher.hidden_size, 2)
    states, own = medusa.make_forward(made)(teacher.states(tokens))
    assert states.shape == (2, 2, CONTEXT, teacher.hidden_size)
    assert float(own) == 0.0
    for state in states:
        torch.testing.assert_close(state, teacher.states(tokens).last)


@pytest.mark.parametrize("offset", [heads.DRAFT_OFFSET, heads.HEAD_OFFSET])
def test_the_loss_looks_at_the_places_that_are_to_be_guessed(teacher: Teacher, offset: int) -> None:
    """An oracle has no loss: row p of position i against the target's row p + offset - 1 + i."""

    def forward(seen: object) -> tuple[Tensor, Tensor]:
        last = teacher.states(tokens).last
        return torch.stack([last.roll(1 - offset - i, dims=1) for i in range(3)]), torch.zeros(())

    tokens = rows()
    assert float(heads.distillation(teacher, forward, offset)(tokens, 0.0)) == pytest.approx(
        0.0, abs=1e-5
    )
    assert (
        float(
            heads.distillation(
                teacher, lambda seen: (torch.stack([seen.last] * 3), torch.zeros(())), offset
            )(tokens, 0.0)
        )
        > 0.1
    )


def pseudo_alone(teacher: Teacher, maps: HiddenTransfer, tokens: Tensor, place: int) -> Tensor:
    """Returns states (positions, hidden) of the pseudo rows at `place`, through whole layers."""
    n, body = place + 1, teacher.module.model
    x = body.embed_tokens(tokens[:, :n])
    for number, layer in enumerate(body.layers):
        for i, entry in enumerate(maps.layers):
            if entry == number:
                x = torch.cat([x, maps.pseudo(i, x[:, n - 1 : n])], dim=1)
        places = torch.arange(x.shape[1])[None]
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[None, None]
        x = layer(
            x,
            attention_mask=mask,
            position_ids=places,
            position_embeddings=body.rotary_emb(x, places),
        )
    found: Tensor = body.norm(x)[0, n:]
    return found


@pytest.mark.parametrize("layers", [[1, 1], [1, 2], [2, 2]])
def test_pseudo_rows_pass_the_layers_as_if_they_continued_the_text(
    teacher: Teacher, layers: list[int]
) -> None:
    torch.manual_seed(0)
    maps, tokens = HiddenTransfer(teacher.hidden_size, layers), rows(batch=1)
    for linear in maps.maps:
        nn.init.normal_(linear.weight, std=0.2)  # type: ignore[arg-type]
    with torch.no_grad():
        states, far = hidden_transfer.make_forward(maps, teacher)(teacher.states(tokens))
        for place in (0, 7, CONTEXT - 1):
            torch.testing.assert_close(
                states[:, 0, place],
                pseudo_alone(teacher, maps, tokens, place),
                atol=1e-4,
                rtol=1e-3,
            )
    assert float(far) > 0 or layers == [2, 2]


def test_pseudo_states_that_are_true_are_at_no_distance() -> None:
    true = torch.randn(2, CONTEXT, 8)
    pseudo = torch.stack([true.roll(-1 - i, dims=1) for i in range(3)], dim=1)
    assert float(hidden_transfer.state_distance(pseudo, true)) == 0.0
    assert float(hidden_transfer.state_distance(torch.zeros_like(pseudo), true)) == pytest.approx(
        1.0
    )


def test_hidden_transfer_wants_a_target_that_it_can_run(teacher: Teacher, target: Path) -> None:
    hidden_transfer.check_target(teacher, CONTEXT)
    other = load_teacher(str(target), "cpu")
    other.module.config.hidden_act = "gelu"
    with pytest.raises(ModelRefused, match="is not a Llama-like model: train medusa for it"):
        hidden_transfer.check_target(other, CONTEXT)


@pytest.mark.parametrize("method", ["medusa", "hidden-transfer", "s3d"])
def test_a_trained_head_is_a_folder_that_the_runtime_reads(
    teacher: Teacher, target: Path, tmp_path: Path, method: str
) -> None:
    made: nn.Module
    settings: dict[str, object]
    if method == "medusa":
        made, settings = Medusa(teacher.hidden_size, 2), {"heads": 2, "blocks": 1}
        forward, offset = medusa.make_forward(made), heads.HEAD_OFFSET
    elif method == "s3d":
        made, settings = (
            s3d.new_s3d(teacher, [0, 2], 1, 2, seed=0),
            {"layers": [0, 2], "masks": 1, "rank": 2},
        )
        forward, offset = s3d.make_forward(made, teacher, [0, 2]), heads.DRAFT_OFFSET
    else:
        made, settings = HiddenTransfer(teacher.hidden_size, [1, 2]), {"layers": [1, 2]}
        forward, offset = hidden_transfer.make_forward(made, teacher), heads.HEAD_OFFSET
    out, found = tmp_path / "out", material(teacher)
    asked = order(out, target, method, settings)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    with folder.open_work(out, asked.recipe("f", "d")) as work:
        measured = train_head(asked, found, made, forward, work, lambda done, loss: None, offset)
    identity = target_identity(teacher.module.config, teacher.tokenizer)
    assert read_settings(out, method, identity) == settings
    tensors = read_tensors(out, {name: tuple(value.shape) for name, value in before.items()})
    assert all(torch.equal(tensors[name], value) for name, value in made.state_dict().items())
    assert not torch.equal(tensors[next(iter(before))], next(iter(before.values())))
    assert [at.temperature for at in measured] == [0.0, 0.8]
    assert [len(at.rates) for at in measured] == [2, 2]
    assert len(json.loads((out / "training.json").read_text())["losses"]) == 3
    assert "Acceptance" in (out / "README.md").read_text()
    assert not out.with_name("out.partial").exists()


def test_the_target_is_left_as_it_is(teacher: Teacher) -> None:
    assert not any(
        parameter.requires_grad or parameter.grad is not None
        for parameter in teacher.module.parameters()
    )


# Acceptance


def knowing(
    answer: outputs.TargetText, positions: int, offset: int, right: Sequence[bool]
) -> Callable[[Sequence[int], int], Tensor]:
    """Guesses that hold the truth first, or, where they are wrong, second."""

    def guess(tokens: Sequence[int], first: int) -> Tensor:
        found = torch.zeros(positions, len(tokens), 16)
        for i in range(positions):
            for p in range(len(tokens)):
                if (place := p + offset + i) < len(tokens):
                    found[i, p, tokens[place]] = 5.0
                    if not right[i]:
                        found[i, p, (tokens[place] + 1) % 16] = 9.0
        return found[:, first:]

    return guess


@pytest.mark.parametrize("offset", [1, 2])
def test_acceptance_counts_places_and_chains(offset: int) -> None:
    answer = outputs.TargetText((1, 2, 3), (4, 5, 6, 7, 8, 9), SamplingParams())
    (at,) = measure_acceptance([answer], knowing(answer, 3, offset, (True, False, True)), offset)
    assert [rates[1] for rates in at.rates] == [1.0, 0.0, 1.0]
    assert [rates[2] for rates in at.rates] == [1.0, 1.0, 1.0]
    assert at.chain == 2.0
    assert set(at.rates[0]) == set(RANKS)


def test_guesses_share_the_targets_noise_above_temperature_0() -> None:
    """A guesser with the target's own logits is right at any temperature, though both draw."""
    from runtime.core.sampler_reference import SamplingInput
    from runtime.models.sampler import choose

    sampling, same = SamplingParams(temperature=1.0, seed=5), torch.zeros(1, 16)
    tokens: list[int] = []
    for _ in range(12):
        tokens.append(
            int(choose(same, SamplingInput(sampling, 2, [1, 2], [tokens], frozenset()))[0])
        )
    assert len(set(tokens)) > 4
    answer = outputs.TargetText((1, 2), tuple(tokens), sampling)
    (at,) = measure_acceptance(
        [answer], lambda text, first: torch.zeros(1, len(text) - first, 16), 1
    )
    assert at.rates[0][1] == 1.0
