"""Products with weight matrices on a CPU, for the few rows of a step.

With few rows the cost of a product is reading the matrix, and BLAS libraries add to it: for 4 rows
or more they rearrange the matrix first. A copy that is already arranged (PackedWeight), in 16 bits
if that is exact, costs hardly more than the reading. Where the processor multiplies pairs of
bfloat16 numbers, a measurement decides whether bfloat16 models use that. oneDNN serves processors
for which there is no PackedWeight.

Measured on one core of an AMD EPYC (Zen 5: AVX-512, AVX512_BF16): all 134 million weights of
SmolLM2-135M, milliseconds of CPU time by rows (minimum of 14, interleaved, on a busy machine whose
core read 36 GB/s from memory at the time):

                              1     2     4     8    12    16    24    32    64
    float32 weights        15.3  16.4  17.7  18.8  17.6  21.1  29.6  39.5  80.4
    bfloat16 weights        8.9   9.7   9.6  10.9  15.0  19.3  28.6  38.5  81.0
    pairs of bfloat16       8.5   8.9   9.4  10.1   9.6  11.4  15.1  20.4  40.8

Arithmetic sets the limit beyond that. A row takes one FMA for 16 weights, and a core does about 7 a
nanosecond: 1.25 ms a row here, whatever the type of the weights. Reading takes 7 times as long in
16 bits and 12 times in 32, so in float32 a pass of more than 7 rows (12) is bound by arithmetic,
and 16 rows cost twice as much as one. Pairs do twice the work an instruction: 0.62 ms a row, and
14 rows for the price of reading.

A call costs a few microseconds more than a call of torch, so torch handles small float32 matrices.
"""

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from runtime.kernels.jit import has_pairs, is_supported
from runtime.kernels.kernel_choice import KernelChoice, Product, choose_kernel
from runtime.kernels.packed_weight import HALF_DTYPES, PackedWeight, smallest_exact_dtype

MIN_PANEL_WEIGHTS = 1 << 16  # smaller matrices in float32 are not packed
MIN_ONEDNN_WEIGHTS = 1 << 19  # the same for oneDNN
ONEDNN_ROWS_HINT = 16  # row count that oneDNN optimizes for; any other works too
ONEDNN_MIN_ROWS = {torch.float32: 4, torch.bfloat16: 1}  # fewer rows bypass oneDNN


def candidates(weight: torch.Tensor) -> tuple[str, ...]:
    """Return the kernels that may compute products with this matrix, in order of preference.

    Only kernels by which a row's result does not depend on its neighbours are candidates, if there
    are any: "pairs" and "panels". The others are "onednn" and "torch".
    """
    if weight.device.type != "cpu":
        return ("torch",)
    if is_supported():
        if weight.dtype == torch.bfloat16 and has_pairs():
            return ("pairs", "panels")
        # Small matrices in 16 bits too: rounding would show a row's neighbours.
        if weight.dtype in HALF_DTYPES or (
            weight.dtype == torch.float32 and weight.numel() >= MIN_PANEL_WEIGHTS
        ):
            return ("panels",)
    elif (
        torch.backends.mkldnn.is_available()
        and weight.dtype in ONEDNN_MIN_ROWS
        and weight.numel() >= MIN_ONEDNN_WEIGHTS
    ):
        return ("onednn", "torch")
    return ("torch",)


def kernel_of(weight: torch.Tensor) -> KernelChoice:
    """Return the kernel for this matrix; measures candidates that were never measured here."""
    outer, inner = weight.shape
    return choose_kernel(
        weight.dtype,
        (outer, inner),
        candidates(weight),
        lambda kernel, matrix: PRODUCTS[kernel](matrix, None),
    )


def copy_bytes(weight: torch.Tensor) -> int:
    """Return the size of the copy that would be used; 0 if there is none."""
    match candidates(weight)[0]:  # alternatives in bfloat16 are of the same size
        case "panels":
            return weight.numel() * smallest_exact_dtype(weight).itemsize
        case "pairs" | "onednn":
            return weight.numel() * weight.element_size()
    return 0


def has_room(module: nn.Module) -> bool:
    """Return whether the copies would fit in half of the free memory."""
    needed = sum(copy_bytes(p.detach()) for p in module.parameters() if p.dim() == 2)
    return needed <= os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


class TorchProduct:
    """Computes rows @ weight.T + bias by torch, in the type of the matrix."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._bias, self._transposed = bias, weight.t()

    def __call__(self, rows: torch.Tensor, addend: torch.Tensor | None) -> torch.Tensor:
        if addend is None:
            added = self._bias
        else:
            added = addend if self._bias is None else addend + self._bias
        own = rows.to(self._transposed.dtype)
        if added is None:
            return torch.mm(own, self._transposed).to(rows.dtype)
        return torch.addmm(added.to(own.dtype), own, self._transposed).to(rows.dtype)


class OneDnnProduct:
    """Computes rows @ weight.T + bias by oneDNN, from a copy in its own order."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._few, self._bias, self._dtype = TorchProduct(weight, bias), bias, weight.dtype
        self._min_rows = ONEDNN_MIN_ROWS[weight.dtype]
        self._matrix = torch.ops.mkldnn._reorder_linear_weight(
            weight.contiguous(), ONEDNN_ROWS_HINT
        )

    def __call__(self, rows: torch.Tensor, addend: torch.Tensor | None) -> torch.Tensor:
        if len(rows) < self._min_rows:
            return self._few(rows, addend)
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            rows.to(self._dtype), self._matrix, self._bias, "none", [], ""
        ).to(rows.dtype)
        return result if addend is None else result.add_(addend)


PRODUCTS: dict[str, Callable[[torch.Tensor, torch.Tensor | None], Product]] = {
    "pairs": lambda weight, bias: PackedWeight(weight, bias, torch.bfloat16, pairs=True),
    "panels": lambda weight, bias: PackedWeight(weight, bias, smallest_exact_dtype(weight)),
    "onednn": OneDnnProduct,
    "torch": TorchProduct,
}


class LinearOp:
    """Computes rows @ weight.T + bias, (n, inner) -> (n, outer), in the type of the rows.

    With `pack` it uses an arranged copy of the matrix if that is faster.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, pack: bool) -> None:
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        outer, inner = self.weight.shape
        unpacked = KernelChoice("torch", (outer, inner), {})
        self.choice = kernel_of(self.weight) if pack else unpacked
        self.product = PRODUCTS[self.choice.kernel](self.weight, self.bias)

    def __call__(self, rows: torch.Tensor, addend: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the product and add `addend` to it."""
        return self.product(rows, addend)


class PackedLinear(nn.Linear):
    """A linear layer computed by LinearOp. It shares the parameters of the original layer."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.product = LinearOp(linear.weight, linear.bias, pack=True)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (torch's own name)
        if torch.is_grad_enabled():
            return F.linear(input, self.weight, self.bias)
        return self.product(input.reshape(-1, self.in_features)).view(
            *input.shape[:-1], self.out_features
        )


def pack(module: nn.Module) -> None:
    """Replace the linear layers of a model that benefit from packing; parameters stay in place."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and kernel_of(child.weight).kernel != "torch":
                setattr(parent, name, PackedLinear(child))
