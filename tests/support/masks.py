"""Makes an untrained S3D for a tiny target, with random masks and a large random adapter."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from runtime.drafters.base import DrafterContext
from runtime.drafters.s3d import S3D, MaskDrafter, build
from runtime.models.head_checkpoint import target_identity, write_checkpoint
from runtime.models.loader import load_model, load_tokenizer
from tests.support.pair import save_model

LAYERS, MASKS, RANK = [0, 2], 3, 4


class Tiny(NamedTuple):
    """Folders of a target and of what was trained for it; that as a module."""

    target: Path
    folder: Path
    made: S3D


@cache
def tiny(vocabulary: int = 4096, context: int = 4096) -> Tiny:
    root = Path(tempfile.mkdtemp(prefix="outrider-tests-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    target = save_model(
        root / "target", num_hidden_layers=3, vocab_size=vocabulary, context=context
    )
    module: Any = load_model(str(target), step="generic").module
    made = S3D([module.model.layers[layer] for layer in LAYERS], 32, MASKS, RANK)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("up"):
                nn.init.normal_(parameter, std=0.1)
    settings = {"layers": LAYERS, "masks": MASKS, "rank": RANK}
    write_checkpoint(
        root / "s3d",
        "s3d",
        target_identity(module.config, load_tokenizer(str(target))),
        settings,
        dict(made.state_dict()),
    )
    return Tiny(target, root / "s3d", made)


def ingredients(target: Path, folder: Path) -> DrafterContext:
    def changed(name: str, layers: Any, change: Any) -> Any:
        return load_model(name, layers=layers, change=change)

    return DrafterContext(str(target), str(folder), load_model, load_model, changed)


def drafter(found: Tiny) -> MaskDrafter:
    return build(ingredients(found.target, found.folder))
