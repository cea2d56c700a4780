"""Products with weight matrices on a CPU, for the few rows that a step has.

BLAS libraries rearrange a matrix before they multiply it with 4 rows or more, which costs more than the product. oneDNN can be given
a copy that is arranged already. Measured on one core with AVX-512 and without bf16 units, six layers of a Llama of width 768, float32,
milliseconds a layer by rows (least of nine, machine busy, compared in turn):

                 1     2     4     6     8    12    16    32
    F.linear   5.3   5.2  10.5  11.0  15.0  21.7  14.7  16.2
    packed     5.3   6.7   6.5   6.7   8.1   8.8   9.4  11.6

A call costs 0.03 ms more, so small matrices are left as they are. In bfloat16 packing pays from one row on where the processor has
units for it (measured elsewhere: a step of an 88M model 35.5 -> 26.8 ms), and not at all where it has none.
"""

import os

import torch
import torch.nn.functional as F
from torch import nn

WEIGHTS = 1 << 19  # of a matrix, from which on packing pays
HINT = 16  # rows that oneDNN arranges a matrix for; others are served as well
LEAST = {torch.float32: 4, torch.bfloat16: 1}  # rows from which on the packed copy is used


def pays(weight: torch.Tensor) -> bool:
    """Whether a packed copy of this matrix would be used."""
    able = torch.backends.mkldnn.is_available() and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and native_bf16()))
    return able and weight.device.type == "cpu" and weight.numel() >= WEIGHTS


def native_bf16() -> bool:
    """Whether this processor multiplies in bfloat16."""
    found: bool = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return found


def has_room(module: nn.Module) -> bool:
    """Whether packed copies would take no more than half of the memory that is free."""
    needed = sum(p.numel() * p.element_size() for p in module.parameters() if p.dim() == 2 and pays(p))
    return needed <= os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


class Product:
    """rows @ weight.T + bias; `rows` (n, inner) -> (n, outer). With `pack`, by a packed copy where that pays."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, pack: bool) -> None:
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self._turned, self._least = self.weight.t(), LEAST.get(weight.dtype, 1)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), HINT) if pack and pays(weight) else None

    def __call__(self, rows: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        """`onto` is added to the result."""
        if self._packed is not None and len(rows) >= self._least:
            result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")
            return result if onto is None else result.add_(onto)
        onto = self.bias if onto is None else onto if self.bias is None else onto + self.bias
        return torch.mm(rows, self._turned) if onto is None else torch.addmm(onto, rows, self._turned)


class PackedLinear(nn.Linear):
    """A linear layer by `Product`. It shares the parameters of the layer that it is made from."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.product = Product(linear.weight, linear.bias, pack=True)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (torch's own name)
        if torch.is_grad_enabled():
            return F.linear(input, self.weight, self.bias)
        return self.product(input.reshape(-1, self.in_features)).view(*input.shape[:-1], self.out_features)


def pack(module: nn.Module) -> None:
    """Replace the linear layers of a model for which packing pays; its parameters stay what and where they are."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and pays(child.weight):
                setattr(parent, name, PackedLinear(child))
