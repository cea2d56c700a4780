"""Products with a repacked matrix equal the plain product, by panels and by oneDNN."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from runtime.kernels import linear
from runtime.kernels.jit import is_supported
from runtime.kernels.linear import (
    MIN_ONEDNN_WEIGHTS,
    MIN_PANEL_WEIGHTS,
    ONEDNN_MIN_ROWS,
    LinearOp,
    PackedLinear,
    candidates,
    copy_bytes,
    has_room,
    pack,
)

LARGE = (1024, 512)


@pytest.fixture(params=[True, False], ids=["panels", "oneDNN"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether this processor has panels."""
    has: bool = request.param
    if has and not is_supported():
        pytest.skip("no kernel for this processor")
    monkeypatch.setattr(linear, "is_supported", lambda: has)
    return has


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 16, 64, 65])
@pytest.mark.parametrize("shape", [LARGE, (1031, 520), (96, 32)])
def test_packing_changes_nothing_but_rounding(
    shape: tuple[int, int], rows: int, bias: bool, ways: bool
) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(shape) / shape[1] ** 0.5, torch.randn(rows, shape[1])
    offset, addend = torch.randn(shape[0]) if bias else None, torch.randn(rows, shape[0])
    with torch.inference_mode():
        for packed in (False, True):
            product = LinearOp(weight, offset, packed)
            torch.testing.assert_close(product(x), F.linear(x, weight, offset), atol=1e-5, rtol=0)
            torch.testing.assert_close(
                product(x, addend.clone()), F.linear(x, weight, offset) + addend, atol=1e-5, rtol=0
            )


def test_a_row_is_the_same_whatever_stands_beside_it(ways: bool) -> None:
    torch.manual_seed(0)
    product, x = LinearOp(torch.randn(LARGE) / 16, None, pack=True), torch.randn(32, 512)
    assert ONEDNN_MIN_ROWS[torch.float32] <= 8
    with torch.inference_mode():
        whole, part = product(x)[:8], product(x[:8])
    assert torch.equal(whole, part) or not ways
    torch.testing.assert_close(whole, part, atol=1e-5, rtol=0)


@pytest.mark.parametrize("has_pairs", [False, True])
def test_only_kernels_with_independent_rows_are_candidates_where_there_are_any(
    ways: bool, has_pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "has_pairs", lambda: has_pairs)
    large, short, half = (
        torch.empty(LARGE, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)
    )
    if ways:
        in_16_bits = ("pairs", "panels") if has_pairs else ("panels",)
        assert [candidates(weight) for weight in (large, short, half)] == [
            ("panels",),
            in_16_bits,
            ("panels",),
        ]
        assert candidates(short[:8]) == in_16_bits
        assert candidates(half[:8]) == ("panels",)
    else:
        assert [candidates(weight) for weight in (large, short, half)] == [
            ("onednn", "torch"),
            ("onednn", "torch"),
            ("torch",),
        ]
        assert candidates(short[:8]) == ("torch",)
    assert candidates(torch.empty(MIN_PANEL_WEIGHTS // 256 - 1, 256)) == ("torch",)
    below = torch.empty(MIN_ONEDNN_WEIGHTS // 256 - 1, 256)
    assert candidates(below) == (("panels",) if ways else ("torch",))


@pytest.mark.parametrize("kernel", ["pairs", "panels"])
@pytest.mark.parametrize("shape", [LARGE, (24, 17)])
def test_a_bfloat16_row_is_the_same_whatever_stands_beside_it(
    kernel: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(shape).bfloat16()
    if kernel not in candidates(weight):
        pytest.skip("no such kernel for this processor")
    monkeypatch.setattr(linear, "candidates", lambda weight: (kernel,))
    product, x = LinearOp(weight, None, pack=True), torch.randn(33, shape[1]).bfloat16()
    assert product.choice.kernel == kernel
    with torch.inference_mode():
        alone = torch.cat([product(row) for row in x.split(1)])
        for count in (1, 2, 8, 16, 33):
            assert torch.equal(product(x[:count]), alone[:count])


def test_a_copy_takes_what_the_shortest_exact_type_needs(ways: bool) -> None:
    weight = torch.randn(LARGE)
    assert copy_bytes(weight) == 4 * weight.numel()
    assert copy_bytes(weight.bfloat16().float()) == (2 if ways else 4) * weight.numel()
    assert copy_bytes(torch.randn(8, 8)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_units_for_it_16_bits_go_through_panels(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_supported():
        pytest.skip("no kernel for this processor")
    monkeypatch.setattr(linear, "has_pairs", lambda: False)
    weight, x = (torch.randn(LARGE) / 16).to(dtype), torch.randn(3, 512).to(dtype)
    found = LinearOp(weight, None, pack=True)(x)
    assert torch.equal(found, LinearOp(weight.float(), None, pack=True)(x.float()).to(dtype))


def test_without_room_for_copies_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(512, 1024))
    assert has_room(model)
    monkeypatch.setattr("os.sysconf", lambda name: 1000)  # a megabyte
    assert not has_room(model)
    assert has_room(nn.Sequential(nn.Linear(8, 8)))


def test_layers_of_a_model_share_their_parameters_with_what_replaces_them(ways: bool) -> None:
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
