"""Products with weight matrices on a CPU, for the few rows of a step.

With few rows the cost of a product is reading the matrix, and BLAS libraries add to it: for 4 rows
or more they rearrange the matrix first. A copy that is already arranged (PackedWeight), in 16 bits
if that is exact, costs hardly more than the reading. If the processor multiplies bfloat16, oneDNN
serves bfloat16 models, also with an arranged copy; it also serves float32 if PackedWeight is not
supported.

Measured on one core with AVX-512 and without bf16 units: 63 million weights as in nine layers of a
Llama of width 768, float32, milliseconds by rows (minimum of eight for each matrix, interleaved, on
a busy machine):

                              1     2     4     8    14    16    24    32    64
    F.linear               25.7  26.2  50.0  71.2   107  67.5  76.4  84.5   118
    oneDNN                 30.8  31.1  30.8  35.9  40.8  42.7  51.9  60.3  91.1
    packed in float32      26.7  26.3  26.8  27.6  29.4  32.4  36.6  46.3  83.9
    packed in bfloat16     13.8  13.9  14.3  15.2  18.2  22.0  28.6  39.0  79.3

A call costs a few microseconds more than a call of torch, so torch handles small matrices.
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
        self._product = PRODUCTS[self.choice.kernel](self.weight, self.bias)

    def __call__(self, rows: torch.Tensor, addend: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the product and add `addend` to it."""
        return self._product(rows, addend)


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
