"""Reads and writes the folder of a trained head. Its content is untrusted.

    config.json         {"method": NAME, "target": {"hidden_size", "layers", "vocabulary",
                         "tokenizer"}, "settings": {...}}; `target` identifies whose hidden states
                         the head was trained on
    model.safetensors   tensors, by the names that the method gives them

Other files, such as a model card, are ignored.
"""

import importlib.resources
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from runtime.core.errors import ModelRefused
from runtime.models.base import ModelIdentity
from runtime.models.loader import read_json, reject_remote_code
from runtime.models.quiet import one_line
from runtime.models.vocab_check import Vocabulary, vocabulary_hash

TRAIN_HINT = "train one with `outrider train`"
Settings = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def target_identity(config: PreTrainedConfig, tokenizer: Vocabulary) -> ModelIdentity:
    text: Any = config.get_text_config(decoder=True)
    return ModelIdentity(
        text.hidden_size, text.num_hidden_layers, text.vocab_size, vocabulary_hash(tokenizer)
    )


def read_settings(folder: Path, method: str, identity: ModelIdentity) -> Settings:
    """Read the settings in config.json.

    Raises ModelRefused for a checkpoint of another method or another target.
    """
    if not (folder / "config.json").is_file():
        raise ModelRefused(
            f"{folder} has no config.json: give the folder of a trained head, or {TRAIN_HINT}"
        )
    reject_remote_code(folder, str(folder))
    config = read_json(folder / "config.json", str(folder))
    if config.get("method") != method:
        raise ModelRefused(
            f"{folder} holds {str(config.get('method'))[:64]!r} and not {method}: "
            "give the folder of another head"
        )
    target, settings = config.get("target"), config.get("settings")
    if not isinstance(target, dict) or not isinstance(settings, dict):
        raise ModelRefused(f"{folder}/config.json lacks `target` or `settings`: copy it again")
    for name, logit_rows in asdict(identity).items():
        if target.get(name) != logit_rows:
            said, should = str(target.get(name))[:16], str(logit_rows)[:16]
            raise ModelRefused(
                f"{folder} was trained for another target ({name} {said}, not {should}): "
                f"{TRAIN_HINT} for this one"
            )
    return settings


def shipped_folders(method: str) -> list[Path]:
    """Return the folders trained for the method that ship, for one target each."""
    models = Path(str(importlib.resources.files("models")))
    return sorted(file.parent for file in models.glob(f"*/{method}/config.json"))


def find_checkpoint(folder: str, method: str, identity: ModelIdentity) -> Path:
    """Return the folder, or else the shipped one that was trained for this target.

    Raises ModelRefused as `read_settings` does, or if none ships for it.
    """
    for place in [Path(folder)] if folder else shipped_folders(method):
        try:
            read_settings(place, method, identity)
        except ModelRefused:
            if folder:
                raise
        else:
            return place
    raise ModelRefused(
        f"no {method} drafter ships for this target: train one with `outrider train {method}` "
        "and give its folder"
    )


def whole_number(folder: Path, settings: Settings, name: str, least: int, most: int) -> int:
    """Return a setting. Raises ModelRefused unless it is an integer from `least` to `most`."""
    value = settings.get(name)
    if type(value) is not int or not least <= value <= most:
        raise ModelRefused(
            f"{folder}/config.json: {name} {str(value)[:16]} is not an integer "
            f"from {least} to {most}: copy it again"
        )
    return value


def read_tensors(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], whole: Sequence[str] = ()
) -> Tensors:
    """Read exactly these tensors, in their stored type; those named in `whole` are int64, all
    others floating point.

    Raises ModelRefused if the file contains anything else, before reading it.
    """
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            names = file.keys()
            found = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            if found != dict(shapes):
                wrong = min(
                    name
                    for name in found.keys() | shapes.keys()
                    if found.get(name) != shapes.get(name)
                )
                raise ModelRefused(
                    f"{folder}/model.safetensors does not fit its config.json ({wrong[:64]}): "
                    f"copy it again, or {TRAIN_HINT}"
                )
            tensors = {name: file.get_tensor(name) for name in found}
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelRefused(
            f"{folder}/model.safetensors cannot be read ({one_line(error)}): copy it again"
        ) from error
    if not all(
        tensor.dtype == torch.int64
        if name in whole
        else tensor.is_floating_point() and tensor.isfinite().all()
        for name, tensor in tensors.items()
    ):
        raise ModelRefused(
            f"{folder}/model.safetensors contains non-finite numbers or another type: "
            f"copy it again, or {TRAIN_HINT}"
        )
    return tensors


def write_checkpoint(
    folder: Path, method: str, identity: ModelIdentity, settings: Settings, tensors: Tensors
) -> None:
    """Write a checkpoint atomically, replacing an existing folder. Raises OSError."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        config = {"method": method, "target": asdict(identity), "settings": settings}
        (temporary / "config.json").write_text(
            json.dumps(config, indent=2) + "\n", encoding="utf-8"
        )
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary / "model.safetensors",
        )
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
