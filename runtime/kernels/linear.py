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

import torch
import torch.nn.functional as F
from torch import nn

from runtime.kernels.jit import is_supported
from runtime.kernels.packed_weight import PackedWeight, smallest_exact_dtype

MIN_PANEL_WEIGHTS = 1 << 16  # smaller matrices are not packed
MIN_ONEDNN_WEIGHTS = 1 << 19  # the same for oneDNN
ONEDNN_ROWS_HINT = 16  # row count that oneDNN optimizes for; any other works too
ONEDNN_MIN_ROWS = {torch.float32: 4, torch.bfloat16: 1}  # fewer rows bypass oneDNN


def native_bf16() -> bool:
    """Return whether this processor multiplies bfloat16."""
    found: bool = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return found


def uses_panels(weight: torch.Tensor) -> bool:
    """Return whether a PackedWeight would be used."""
    fits = weight.dtype in (torch.float32, torch.float16) or (
        weight.dtype == torch.bfloat16 and not native_bf16()
    )
    return (
        fits
        and weight.device.type == "cpu"
        and weight.numel() >= MIN_PANEL_WEIGHTS
        and is_supported()
    )


def uses_onednn(weight: torch.Tensor) -> bool:
    """Return whether oneDNN's copy would be used, which requires that PackedWeight is not."""
    fits = torch.backends.mkldnn.is_available() and (
        weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and native_bf16())
    )
    return (
        fits
        and weight.device.type == "cpu"
        and weight.numel() >= MIN_ONEDNN_WEIGHTS
        and not uses_panels(weight)
    )


def copy_bytes(weight: torch.Tensor) -> int:
    """Return the size of the copy that would be used; 0 if there is none."""
    if uses_panels(weight):
        return weight.numel() * smallest_exact_dtype(weight).itemsize
    return weight.numel() * weight.element_size() if uses_onednn(weight) else 0


def has_room(module: nn.Module) -> bool:
    """Return whether the copies would fit in half of the free memory."""
    needed = sum(copy_bytes(p.detach()) for p in module.parameters() if p.dim() == 2)
    return needed <= os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


class LinearOp:
    """Computes rows @ weight.T + bias, (n, inner) -> (n, outer).

    With `pack` it uses an arranged copy of the matrix if that is faster.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, pack: bool) -> None:
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self._transposed, self._min_rows = self.weight.t(), ONEDNN_MIN_ROWS.get(weight.dtype, 1)
        self._panels = (
            PackedWeight(self.weight, self.bias, smallest_exact_dtype(self.weight))
            if pack and uses_panels(self.weight)
            else None
        )
        reorder = pack and uses_onednn(self.weight)
        self._onednn = (
            torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), ONEDNN_ROWS_HINT)
            if reorder
            else None
        )

    def __call__(self, rows: torch.Tensor, addend: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the product and add `addend` to it."""
        if self._panels is not None:
            return self._panels(rows, addend)
        if self._onednn is not None and len(rows) >= self._min_rows:
            result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                rows, self._onednn, self.bias, "none", [], ""
            )
            return result if addend is None else result.add_(addend)
        addend = (
            self.bias if addend is None else addend if self.bias is None else addend + self.bias
        )
        return (
            torch.mm(rows, self._transposed)
            if addend is None
            else torch.addmm(addend, rows, self._transposed)
        )


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
            if type(child) is nn.Linear and (
                uses_panels(child.weight) or uses_onednn(child.weight)
            ):
                setattr(parent, name, PackedLinear(child))
