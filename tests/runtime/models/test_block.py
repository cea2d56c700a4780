"""The block layer: what its checkpoint holds, and what its Markov head knows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.core.errors import ModelRefused
from runtime.models.base import ModelIdentity
from runtime.models.block import Block, BlockShape, read_block, write_block
from runtime.models.eagle import EagleShape, read_eagle

IDENTITY = ModelIdentity(16, 4, 40, "0" * 64)
SHAPE = BlockShape(EagleShape((1, 2, 4), 24, 4, 2, 8, 1e4, 1e-5, 10), 5, 3)


def made() -> Block:
    torch.manual_seed(0)
    return Block(16, SHAPE)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_block(tmp_path / "block", made(), IDENTITY)
    read, wrote = read_block(tmp_path / "block", IDENTITY), made()
    assert read.block_shape == SHAPE
    assert read.mask_embed.shape == (4, 16)
    for name, tensor in read.named_parameters():
        assert torch.equal(tensor, wrote.get_parameter(name).to(torch.bfloat16)), name


def test_it_is_no_eagle(tmp_path: Path) -> None:
    write_block(tmp_path / "block", made(), IDENTITY)
    with pytest.raises(ModelRefused, match="holds 'block' and not eagle"):
        read_eagle(tmp_path / "block", IDENTITY)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"places": 1}, "places 1"),
        ({"places": 33}, "places 33"),
        ({"rank": 0}, "rank 0"),
        ({"layer": replace(SHAPE.layer, layers=(2, 1))}, "layers"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    tmp_path: Path, changed: dict[str, Any], says: str
) -> None:
    module = made()
    module.block_shape = replace(SHAPE, **changed)
    write_block(tmp_path / "block", module, IDENTITY)
    with pytest.raises(ModelRefused, match=says):
        read_block(tmp_path / "block", IDENTITY)


def test_other_masks_than_the_settings_say_are_refused(tmp_path: Path) -> None:
    module = made()
    module.block_shape = replace(SHAPE, places=6)
    write_block(tmp_path / "block", module, IDENTITY)
    with pytest.raises(ModelRefused, match="mask_embed"):
        read_block(tmp_path / "block", IDENTITY)


def test_the_markov_head_depends_on_the_token_and_on_the_state() -> None:
    module, (states, tokens) = made(), torch.randn(2, 2, 16)
    own = module.markov(module.gates(states), tokens)
    assert own.shape == (2, 16)
    for others in ((states.flip(0), tokens), (states, tokens.flip(0))):
        assert not torch.allclose(module.markov(module.gates(others[0]), others[1]), own, atol=1e-3)
