"""Edits model folders and checks that they are refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.core.errors import ModelRefused
from runtime.models.loader import load_model

WEIGHTS = "model.safetensors"


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refused(folder: Path | str, message: str, load: Callable[[str], object] = load_model) -> None:
    with pytest.raises(ModelRefused) as caught:
        load(str(folder))
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500 + len(str(folder))
    assert message in text
    assert ": " in text, "the way out follows a colon"
