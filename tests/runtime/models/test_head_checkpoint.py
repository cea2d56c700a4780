"""A folder of a trained head is complete and matches its method and its target."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from actors.compose import build_target
from actors.launch.prepare import check_models
from runtime.core.errors import ModelRefused
from runtime.core.messages import Request
from runtime.core.sampling_params import SamplingParams
from runtime.deployment_builder import build_deployment
from runtime.heads import hidden_transfer, medusa
from runtime.heads.base import HeadContext
from runtime.models.base import ModelIdentity
from runtime.models.head_checkpoint import (
    read_settings,
    read_tensors,
    target_identity,
    write_checkpoint,
)
from runtime.models.loader import load_tokenizer
from tests.support.families import VOCABULARY, hf_model
from tests.support.harness import answer
from tests.support.pair import save_model

IDENTITY = ModelIdentity(32, 2, VOCABULARY, "0" * 64)
SETTINGS = {"heads": 2, "blocks": 1}


class Words:
    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "b": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(
        tmp_path / "head", "medusa", IDENTITY, SETTINGS, dict(medusa.Medusa(32, 2).state_dict())
    )
    return tmp_path / "head"


def mount(folder: Path, identity: ModelIdentity = IDENTITY) -> HeadContext:
    return HeadContext(hf_model("llama"), identity, folder)


def test_what_is_written_is_read(folder: Path) -> None:
    assert read_settings(folder, "medusa", IDENTITY) == SETTINGS
    shapes = {
        f"heads.{head}.0.{name}": shape
        for head in range(2)
        for name, shape in (("weight", (32, 32)), ("bias", (32,)))
    }
    assert set(read_tensors(folder, shapes)) == set(shapes)
    assert [path.name for path in folder.parent.iterdir()] == ["head"]
    write_checkpoint(
        folder,
        "medusa",
        IDENTITY,
        {"heads": 1, "blocks": 1},
        dict(medusa.Medusa(32, 1).state_dict()),
    )
    assert len(medusa.build(mount(folder)).module.heads) == 1


def test_what_cannot_be_written_leaves_the_old(folder: Path) -> None:
    with pytest.raises(TypeError):
        write_checkpoint(folder, "medusa", IDENTITY, {"heads": object()}, {})
    assert read_settings(folder, "medusa", IDENTITY) == SETTINGS
    assert [path.name for path in folder.parent.iterdir()] == ["head"]


def test_who_a_target_is() -> None:
    found = target_identity(hf_model("llama").module.config, Words())
    assert (found.hidden_size, found.layers, found.vocabulary, len(found.tokenizer)) == (
        32,
        2,
        VOCABULARY,
        64,
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden_size", 64), ("layers", 3), ("vocabulary", 97), ("tokenizer", "f" * 64)],
)
def test_another_targets_is_refused(folder: Path, name: str, value: object) -> None:
    with pytest.raises(ModelRefused, match=f"trained for another target \\({name}"):
        medusa.build(mount(folder, replace(IDENTITY, **{name: value})))  # type: ignore[arg-type]


def change(**values: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return edit


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        found = {name: tensor.clone() for name, tensor in medusa.Medusa(32, 2).state_dict().items()}
        change(found)
        save_file(found, folder / "model.safetensors")

    return edit


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "invalid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
        (lambda folder: (folder / "code.py").write_text("import os"), "contains its own code"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"1234567890"),
            "cannot be read",
        ),
        (change(method="hidden-transfer"), "holds 'hidden-transfer' and not medusa"),
        (change(target=None), "lacks `target` or `settings`"),
        (change(settings=[1]), "lacks `target` or `settings`"),
        (change(settings={"heads": 2}), "blocks None is not an integer from 1 to 16"),
        (change(settings={"heads": 10**9, "blocks": 1}), "heads 1000000000 is not an integer"),
        (change(settings={"heads": True, "blocks": 1}), "heads True is not an integer"),
        (
            change(settings={"heads": 3, "blocks": 1}),
            r"does not fit its config.json \(heads.2.0.bias\)",
        ),
        (
            tensors(lambda found: found.pop("heads.1.0.bias")),
            r"does not fit its config.json \(heads.1.0.bias\)",
        ),
        (
            tensors(lambda found: found.update(more=torch.zeros(1))),
            r"does not fit its config.json \(more\)",
        ),
        (tensors(lambda found: found["heads.0.0.bias"].fill_(float("nan"))), "non-finite numbers"),
        (
            tensors(
                lambda found: found.update({"heads.0.0.bias": torch.zeros(32, dtype=torch.int32)})
            ),
            "non-finite numbers",
        ),
    ],
)
def test_a_spoilt_folder_is_refused(
    folder: Path, spoil: Callable[[Path], object], said: str
) -> None:
    spoil(folder)
    with pytest.raises(ModelRefused, match=said):
        medusa.build(mount(folder))


@pytest.mark.parametrize("layers", [None, [], [2], [0], [1.0], [1] * 17, "1", [True]])
def test_layers_that_are_none_are_refused(tmp_path: Path, layers: object) -> None:
    write_checkpoint(
        tmp_path / "head", "hidden-transfer", IDENTITY, {"layers": layers}, {"none": torch.zeros(1)}
    )
    with pytest.raises(ModelRefused, match="must be 1 to 16 layers from 1 to 1 that do not fall"):
        hidden_transfer.build(mount(tmp_path / "head"))


def test_layers_that_fall_are_refused(tmp_path: Path) -> None:
    identity = replace(IDENTITY, layers=4)
    write_checkpoint(
        tmp_path / "head", "hidden-transfer", identity, {"layers": [2, 1]}, {"none": torch.zeros(1)}
    )
    with pytest.raises(ModelRefused, match="that do not fall"):
        hidden_transfer.build(mount(tmp_path / "head", identity))


def test_composed_from_a_configuration(tmp_path: Path) -> None:
    """Runs threads, scheduler, tokenizer and folders in one process as a deployment would."""
    folder = save_model(tmp_path / "target")
    identity = target_identity(AutoConfig.from_pretrained(folder), load_tokenizer(str(folder)))
    write_checkpoint(
        tmp_path / "medusa",
        "medusa",
        identity,
        {"heads": 2, "blocks": 1},
        dict(medusa.Medusa(32, 2).state_dict()),
    )
    transfer = dict(hidden_transfer.HiddenTransfer(32, [1]).state_dict())
    write_checkpoint(tmp_path / "transfer", "hidden-transfer", identity, {"layers": [1]}, transfer)
    drafts = ("token-recycling", str(tmp_path / "medusa"), str(tmp_path / "transfer"))
    # A synchronous schedule uses heads in every step; the living one stops what does not pay.
    plan = build_deployment(str(folder), drafts, 1, "float32", "cpu", local=True, policy="sync")
    assert check_models(plan).warnings == ()

    prompt = (3, 1, 4, 1, 5, 9, 3, 1, 4, 1)

    async def main() -> None:
        target = build_target(plan.target).target
        target.start()
        for temperature in (0.0, 0.8):
            sampling = SamplingParams(max_tokens=40, temperature=temperature, seed=1)
            on, off = [
                await answer(target, Request(f"{wanted}", prompt, sampling, speculation=wanted))
                for wanted in (True, False)
            ]
            assert on.said() == off.said()
            assert on.stats.drafted > 0 == off.stats.drafted
        assert set(target.report().guesses) == {
            "token-recycling-0",
            "medusa-0",
            "hidden-transfer-0",
        }
        await target.stop()

    asyncio.run(main())
