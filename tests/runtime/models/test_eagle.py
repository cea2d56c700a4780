"""The EAGLE draft layer: its passes agree however the rows are grouped, and its checkpoint is
checked."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from runtime.core.errors import ModelRefused
from runtime.models.base import ModelIdentity
from runtime.models.eagle import DRAFT_TOKENS, Eagle, EagleShape, read_eagle, write_eagle

IDENTITY = ModelIdentity(16, 4, 40, "0" * 64)
SHAPE = EagleShape((1, 2, 4), 24, 4, 2, 8, 1e4, 1e-5, 10)


def made() -> Eagle:
    torch.manual_seed(0)
    return Eagle(16, SHAPE)


def run(module: Eagle, embeddings: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    q, k, v = module.project(embeddings, features, positions)
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return module.finish(features, attended)


def test_only_distances_between_positions_matter() -> None:
    module, (embeddings, features) = made(), torch.randn(2, 3, 5, 16)
    near, far = (run(module, embeddings, features, torch.arange(5) + at) for at in (0, 700))
    assert near.shape == (3, 5, 16)
    assert torch.allclose(near, far, atol=1e-4)
    spread = run(module, embeddings, features, 9 * torch.arange(5))
    assert not torch.allclose(near[:, 2:], spread[:, 2:], atol=1e-4)


def test_rows_may_come_one_by_one_over_cached_keys() -> None:
    module, (embeddings, features) = made(), torch.randn(2, 6, 16)
    whole = run(module, embeddings, features, torch.arange(6))
    _, k, v = module.project(embeddings[:5], features[:5], torch.arange(5))
    q, last, value = module.project(embeddings[5:], features[5:], torch.tensor([5]))
    attended = F.scaled_dot_product_attention(
        q, torch.cat([k, last], -2), torch.cat([v, value], -2), enable_gqa=True
    )
    assert torch.allclose(module.finish(features[5:], attended), whole[5:], atol=1e-5)


def test_logits_are_of_the_draft_vocabulary() -> None:
    module, table = made(), torch.randn(40, 16)
    logits = module.logits(torch.randn(2, 16), table[module.draft_tokens])
    assert logits.shape == (2, 10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    module = made()
    module.draft_tokens.copy_(torch.arange(3, 13))
    write_eagle(tmp_path / "eagle", module, IDENTITY)
    return tmp_path / "eagle"


def test_what_is_written_is_read(folder: Path) -> None:
    read, wrote = read_eagle(folder, IDENTITY), made()
    assert read.shape == SHAPE
    assert read.draft_tokens.tolist() == list(range(3, 13))
    for name, tensor in read.named_parameters():
        assert torch.equal(tensor, wrote.get_parameter(name).to(torch.bfloat16)), name


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"layers": (2, 1)}, "layers"),
        ({"layers": (1, 5)}, "layers"),
        ({"layers": ()}, "layers"),
        ({"heads": 3}, "kv_heads"),
        ({"head_dim": 7}, "heads"),
        ({"eps": 0.0}, "eps"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"draft_vocabulary": 41}, "draft_vocabulary"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    tmp_path: Path, changed: dict[str, Any], says: str
) -> None:
    module = made()
    module.shape = replace(SHAPE, **changed)
    write_eagle(tmp_path / "eagle", module, IDENTITY)
    with pytest.raises(ModelRefused, match=says):
        read_eagle(tmp_path / "eagle", IDENTITY)


@pytest.mark.parametrize("tokens", [[0] * 10, [*range(9), 40], [*range(9), -1]])
def test_draft_tokens_are_different_tokens_of_the_target(tmp_path: Path, tokens: list[int]) -> None:
    module = made()
    module.draft_tokens.copy_(torch.tensor(tokens))
    write_eagle(tmp_path / "eagle", module, IDENTITY)
    with pytest.raises(ModelRefused, match=DRAFT_TOKENS):
        read_eagle(tmp_path / "eagle", IDENTITY)


def test_tensors_have_their_types(tmp_path: Path) -> None:
    module = made()
    module.draft_tokens = module.draft_tokens.float()
    write_eagle(tmp_path / "eagle", module, IDENTITY)
    with pytest.raises(ModelRefused, match="another type"):
        read_eagle(tmp_path / "eagle", IDENTITY)


def test_another_target_is_refused(folder: Path) -> None:
    with pytest.raises(ModelRefused, match="another target"):
        read_eagle(folder, replace(IDENTITY, hidden_size=32))
