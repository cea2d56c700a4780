"""Panel products do not depend on other rows, the number of threads or the processor."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import binding

from runtime.kernels import jit as kernels
from runtime.kernels import packed_weight
from runtime.kernels.jit import (
    Kernel,
    compile_kernel,
    has_pairs,
    is_supported,
    load_kernel,
    registers_of,
)
from runtime.kernels.llvm_ir import Program, Registers
from runtime.kernels.packed_weight import MAX_ROWS, PackedWeight, smallest_exact_dtype

KINDS = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = (
    (32, 1),
    (31, 5),
    (100, 700),
    (257, 1031),
)  # one line; less than a panel; two pieces; three, and a panel of one output

pytestmark = pytest.mark.skipif(not is_supported(), reason="no kernel for this processor")
pairs = pytest.mark.skipif(not has_pairs(), reason="no AVX512_BF16")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def matrix(shape: tuple[int, int], kind: torch.dtype, seed: int = 0) -> torch.Tensor:
    numbers: torch.Tensor = (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[1] ** 0.5
    )
    return numbers.to(kind).float()


@settings(max_examples=60, deadline=None)
@given(
    outer=st.integers(1, 130),
    inner=st.integers(1, 600),
    rows=st.integers(1, 2 * MAX_ROWS + 2),
    kind=st.sampled_from(KINDS),
    bias=st.booleans(),
    addend=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_it_is_the_product(
    outer: int, inner: int, rows: int, kind: torch.dtype, bias: bool, addend: bool, seed: int
) -> None:
    weight, random = matrix((outer, inner), kind, seed), torch.Generator().manual_seed(seed + 1)
    offset = torch.randn(outer, generator=random) if bias else None
    x, old = (
        torch.randn(rows, inner, generator=random),
        torch.randn(rows, outer, generator=random) if addend else None,
    )
    exact = (
        x.double() @ weight.double().t()
        + (0.0 if offset is None else offset)
        + (0.0 if old is None else old)
    )
    found = PackedWeight(weight, offset, kind)(x, old)
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_is_the_same_whatever_is_beside_it_and_on_however_many_threads(
    shape: tuple[int, int], kind: torch.dtype
) -> None:
    product, x = (
        PackedWeight(matrix(shape, kind), torch.ones(shape[0]), kind),
        torch.randn(2 * MAX_ROWS + 1, shape[1]),
    )
    torch.set_num_threads(1)
    alone = torch.cat([product(row) for row in x.split(1)])
    for count in (1, 2, 3, 13, 14, 15, 29, MAX_ROWS, MAX_ROWS + 1, len(x)):
        for several in (1, 2, 5):
            torch.set_num_threads(several)
            assert torch.equal(product(x[:count]), alone[:count])


@pytest.mark.parametrize("kind", KINDS)
def test_a_processor_with_shorter_registers_computes_the_same(
    kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = binding.get_host_cpu_features()
    older = {name: has and not name.startswith("avx512") for name, has in features.items()}
    registers = registers_of(older)
    assert registers == Registers(8, 6)
    shorter = compile_kernel(
        Program(kind, registers),
        "haswell",
        ",".join(f"{'+' if has else '-'}{name}" for name, has in older.items()),
    )
    for shape in SHAPES:
        weight, x = matrix(shape, kind), torch.randn(MAX_ROWS + 1, shape[1])
        expected = PackedWeight(weight, None, kind)(x)
        with monkeypatch.context() as patched:
            patched.setattr(packed_weight, "load_kernel", lambda *_: shorter)
            assert torch.equal(PackedWeight(weight, None, kind)(x), expected)


def test_where_fewer_threads_come_than_were_asked_for_they_do_the_shares_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    product, x = (
        PackedWeight(matrix((257, 64), torch.bfloat16), None, torch.bfloat16),
        torch.randn(9, 64),
    )
    torch.set_num_threads(1)
    expected, asked = product(x), []

    def alone(share: Callable[[Any], None], address: Any, count: Any, flags: Any) -> None:
        asked.append(count.value)
        share(address)

    monkeypatch.setattr(kernels, "openmp_library", lambda: SimpleNamespace(GOMP_parallel=alone))
    torch.set_num_threads(4)
    assert torch.equal(product(x), expected)
    assert asked == [4]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_models_of_16_bits_are_computed_in_float32(kind: torch.dtype) -> None:
    weight, x, old = (
        matrix((96, 512), kind),
        torch.randn(5, 512).to(kind),
        torch.randn(5, 96).to(kind),
    )
    found = PackedWeight(weight.to(kind), torch.ones(96, dtype=kind), kind)(x, old)
    assert found.dtype == kind
    torch.testing.assert_close(
        found,
        (x.double() @ weight.double().t() + 1 + old).to(kind),
        atol=2e-5,
        rtol=torch.finfo(kind).eps,
    )


@pairs
@settings(max_examples=60, deadline=None)
@given(
    outer=st.integers(1, 130),
    inner=st.integers(1, 1100),
    rows=st.integers(1, 2 * MAX_ROWS + 2),
    bias=st.booleans(),
    addend=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_pairs_are_the_product_of_bfloat16_rows(
    outer: int, inner: int, rows: int, bias: bool, addend: bool, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed + 1)
    weight, x = matrix((outer, inner), torch.bfloat16, seed), torch.randn(rows, inner)
    offset = torch.randn(outer, generator=random) if bias else None
    old = torch.randn(rows, outer, generator=random) if addend else None
    rounded = x.bfloat16()
    exact = (
        rounded.double() @ weight.double().t()
        + (0.0 if offset is None else offset)
        + (0.0 if old is None else old)
    )
    product = PackedWeight(weight, offset, torch.bfloat16, pairs=True)
    torch.testing.assert_close(product(x, old).double(), exact, atol=1e-5, rtol=1e-6)
    assert torch.equal(product.to_float(rounded, old), product(x, old))
    assert product(rounded, old).dtype == torch.bfloat16


@pairs
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_of_pairs_is_the_same_whatever_is_beside_it(shape: tuple[int, int]) -> None:
    product = PackedWeight(
        matrix(shape, torch.bfloat16), torch.ones(shape[0]), torch.bfloat16, pairs=True
    )
    x = torch.randn(2 * MAX_ROWS + 1, shape[1]).bfloat16()
    torch.set_num_threads(1)
    alone = torch.cat([product.to_float(row) for row in x.split(1)])
    for count in (1, 2, 3, 13, 14, 15, 29, MAX_ROWS, MAX_ROWS + 1, len(x)):
        for several in (1, 2, 5):
            torch.set_num_threads(several)
            assert torch.equal(product.to_float(x[:count]), alone[:count])


def test_an_older_processor_has_no_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        kernels, "binding", SimpleNamespace(get_host_cpu_features=lambda: {"avx512f": True})
    )
    with pytest.raises(LookupError, match="no kernel"):
        load_kernel.__wrapped__(torch.bfloat16, pairs=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_of_the_range_come_through(kind: torch.dtype) -> None:
    limits = torch.finfo(kind)
    numbers = torch.tensor(
        [
            limits.max,
            -limits.max,
            limits.smallest_normal,
            limits.smallest_normal / 2,
            -0.0,
            0.0,
            1.0,
            limits.eps,
        ]
    )
    weight = numbers.to(kind).float()[:, None]
    assert torch.equal(PackedWeight(weight, None, kind)(torch.ones(1, 1)), weight.t())


def test_the_shortest_type_holds_every_weight() -> None:
    weight = torch.randn(300, 1000)
    assert smallest_exact_dtype(weight) == torch.float32
    assert smallest_exact_dtype(weight.bfloat16().float()) == torch.bfloat16
    assert smallest_exact_dtype(weight.half().float()) == torch.float16
    assert smallest_exact_dtype(weight.half()) == torch.float16
    assert smallest_exact_dtype(weight.bfloat16()) == torch.bfloat16
    last = weight.bfloat16().float()
    last[-1, -1] = 1 + 2**-10  # too fine for bfloat16, while others are too small for float16
    last[0, 0] = 2.0**-100
    assert smallest_exact_dtype(last) == torch.float32
    last[-1, -1] = torch.nan
    assert smallest_exact_dtype(last) == torch.float32


def test_processors_that_are_not_known_have_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert registers_of({"avx512f": True}) == Registers(16, 14)
    assert registers_of({"avx2": True, "fma": True}) is None
    assert registers_of({"neon": True}) is None
    monkeypatch.setattr(kernels, "registers_of", lambda _: None)
    with pytest.raises(LookupError, match="no kernel"):
        load_kernel.__wrapped__(torch.bfloat16)
    monkeypatch.setattr(kernels, "load_kernel", load_kernel.__wrapped__)
    assert not is_supported.__wrapped__()


def test_without_threads_of_torch_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "openmp_library", SimpleNamespace)
    assert not is_supported.__wrapped__()


def test_other_shapes_are_refused() -> None:
    product = PackedWeight(matrix((40, 30), torch.bfloat16), None, torch.bfloat16)
    with pytest.raises(ValueError, match="the matrix is 40 x 30"):
        product(torch.zeros(2, 31))
    with pytest.raises(ValueError, match="addend \\(1, 40\\)"):
        product(torch.zeros(2, 30), torch.zeros(1, 40))


def test_rows_and_matrices_need_not_be_dense() -> None:
    weight, x, old = matrix((64, 96), torch.bfloat16), torch.randn(5, 192), torch.randn(64, 5)
    product = PackedWeight(weight.t().contiguous().t(), None, torch.bfloat16)
    assert torch.equal(
        product(x[:, ::2], old.t()),
        PackedWeight(weight, None, torch.bfloat16)(x[:, ::2].contiguous(), old.t().contiguous()),
    )


def test_a_kernel_is_translated_once() -> None:
    assert isinstance(load_kernel(torch.bfloat16), Kernel)
    assert load_kernel(torch.bfloat16) is load_kernel(torch.bfloat16)
