"""A product by a packed copy is the product."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from runtime.models import linear
from runtime.models.linear import LEAST, WEIGHTS, PackedLinear, Product, has_room, pack, pays

LARGE = (1024, 512)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 16, 64, 65])
@pytest.mark.parametrize("shape", [LARGE, (1031, 520), (96, 32)])
def test_packing_changes_nothing_but_rounding(shape: tuple[int, int], rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(shape) / shape[1] ** 0.5, torch.randn(rows, shape[1])
    offset, onto = torch.randn(shape[0]) if bias else None, torch.randn(rows, shape[0])
    with torch.inference_mode():
        for packed in (False, True):
            product = Product(weight, offset, packed)
            torch.testing.assert_close(product(x), F.linear(x, weight, offset), atol=1e-5, rtol=0)
            torch.testing.assert_close(product(x, onto.clone()), F.linear(x, weight, offset) + onto, atol=1e-5, rtol=0)


def test_a_row_is_the_same_whatever_stands_beside_it() -> None:
    torch.manual_seed(0)
    product, x = Product(torch.randn(LARGE) / 16, None, pack=True), torch.randn(32, 512)
    assert LEAST[torch.float32] <= 8
    with torch.inference_mode():
        torch.testing.assert_close(product(x)[:8], product(x[:8]), atol=1e-5, rtol=0)


def test_packing_is_for_large_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pays(torch.empty(LARGE))
    assert not pays(torch.empty(WEIGHTS // 256 - 1, 256))
    assert not pays(torch.empty(LARGE, dtype=torch.float16))
    for native in (False, True):
        monkeypatch.setattr(linear, "native_bf16", lambda native=native: native)
        assert pays(torch.empty(LARGE, dtype=torch.bfloat16)) is native


def test_without_room_for_copies_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(512, 1024))
    assert has_room(model)
    monkeypatch.setattr("os.sysconf", lambda name: 1000)  # a megabyte
    assert not has_room(model)
    assert has_room(nn.Sequential(nn.Linear(8, 8)))


def test_layers_of_a_model_share_their_parameters_with_what_replaces_them() -> None:
    torch.manual_seed(0)
    large, small = nn.Linear(512, 1024), nn.Linear(1024, 16, bias=False)
    model = nn.Sequential(large, nn.ReLU(), nn.Sequential(small))
    names, x = list(model.state_dict()), torch.randn(2, 8, 512)
    expected = model(x)
    pack(model)
    with torch.inference_mode():
        found = model(x)
    assert isinstance(model[0], PackedLinear)
    assert model[0].weight is large.weight
    assert small in model.modules()
    assert large not in model.modules()
    assert list(model.state_dict()) == names
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(x), expected)
    assert model(x).requires_grad
