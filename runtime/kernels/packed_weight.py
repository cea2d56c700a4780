"""A matrix arranged for the compiled kernels, in the smallest type that holds its values exactly.

Products in float32 then read half of the matrix's bytes, or all of them if 16 bits are not exact.
"""

import contextlib
import mmap

import torch
import torch.nn.functional as F

from runtime.kernels.jit import load_kernel
from runtime.kernels.llvm_ir import Arguments

HALF_DTYPES = (torch.bfloat16, torch.float16)
SCAN_WEIGHTS = 1 << 18  # weights compared at a time, so that they fit the cache
HUGE_PAGE_BYTES = 1 << 21  # bytes
MAX_ROWS = 70  # multiplied at once; with more a piece of the matrix no longer fits the cache


def smallest_exact_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return the 16-bit type that holds every weight exactly, or float32 if there is none.

    Most published weights are in bfloat16.
    """
    for kind in HALF_DTYPES:
        if all(
            torch.equal(part, part.to(kind).to(part.dtype))
            for part in weight.split(max(1, SCAN_WEIGHTS // weight.shape[1]))
        ):
            return kind
    return torch.float32


def allocate(shape: torch.Size, kind: torch.dtype) -> torch.Tensor:
    """Allocate memory for sequential reads, in huge pages if the system provides them on request.

    A huge page replaces 512 others in the page table. That saves 4 to 6 % of a product's time.
    """
    size = shape.numel() * kind.itemsize
    if size < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=kind)
    memory = mmap.mmap(-1, size + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # the kernel does not support huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % HUGE_PAGE_BYTES :][:size].view(kind).view(shape)


class PackedWeight:
    """Computes rows @ weight.T + bias on a CPU, summed in float32, (n, inner) -> (n, outer).

    Each row's result depends bit for bit on that row alone. Raises ValueError for other shapes.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        kind: torch.dtype,
        pairs: bool = False,
    ) -> None:
        """Pack the weights; `kind` must hold them exactly. Raises what `load_kernel` raises.

        With `pairs`, where `kind` is bfloat16, the rows are rounded to bfloat16.
        """
        self.kernel = load_kernel(kind, pairs)
        self.outer, self.inner = weight.shape
        self.element = torch.bfloat16 if pairs else torch.float32
        depth = 2 if pairs else 1  # elements of a row in a 32-bit word
        self.words = -(-self.inner // depth)
        self._odd = self.words * depth - self.inner
        panels = -(-self.outer // self.kernel.width)
        self.width = panels * self.kernel.width
        self._spare = self.width - self.outer
        halves = F.pad(weight.to(kind), (0, self._odd, 0, self._spare)).reshape(
            panels, 2, self.kernel.width // 2, self.words, depth
        )
        # In bfloat16 without pairs the halves of a line are interleaved: see `Program.weights`.
        interleaved = kind == torch.bfloat16 and not pairs
        lines = halves.permute((0, 3, 2, 1, 4) if interleaved else (0, 3, 1, 2, 4))
        self.matrix = allocate(lines.shape, kind).copy_(lines)
        self.bias = None if bias is None else F.pad(bias.float(), (0, self._spare))
        self.constant = torch.zeros(self.width) if self.bias is None else self.bias

    def __call__(self, rows: torch.Tensor, addend: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the product and add `addend` to it. The result has the type of the rows."""
        return self.to_float(rows, addend).to(rows.dtype)

    def to_float(self, rows: torch.Tensor, addend: torch.Tensor | None = None) -> torch.Tensor:
        """As a call; the result is in float32, whatever the type of the rows."""
        count, inner = rows.shape
        if inner != self.inner or (addend is not None and addend.shape != (count, self.outer)):
            added = "nothing" if addend is None else tuple(addend.shape)
            raise ValueError(
                f"rows {tuple(rows.shape)} and addend {added} do not fit: "
                f"the matrix is {self.outer} x {self.inner}"
            )
        rows = rows.to(self.element)
        rows = F.pad(rows, (0, self._odd)) if self._odd else rows.contiguous()
        addends, stride = self._addend(addend)
        out = torch.empty(count, self.width)
        block = min(count, MAX_ROWS)
        transposed = rows if count == 1 else torch.empty(block, self.words)
        for first in range(0, count, MAX_ROWS):
            self.kernel(
                Arguments(
                    rows=rows.data_ptr() + 4 * first * self.words,
                    transposed=transposed.data_ptr(),
                    count=min(MAX_ROWS, count - first),
                    inner=self.words,
                    matrix=self.matrix.data_ptr(),
                    panels=self.matrix.shape[0],
                    addend=addends.data_ptr() + 4 * first * stride,
                    addend_stride=stride,
                    out=out.data_ptr() + 4 * first * self.width,
                    out_stride=self.width,
                    work_items=torch.get_num_threads(),
                )
            )
        return out[:, : self.outer].contiguous() if self._spare else out

    def _addend(self, addend: torch.Tensor | None) -> tuple[torch.Tensor, int]:
        """Return what is added to each row's sums, and its stride: 0 if it is the same for all
        rows.
        """
        if addend is None:
            return self.constant, 0
        wide = F.pad(addend.float(), (0, self._spare)) if self._spare else addend.float()
        return (wide if self.bias is None else wide + self.bias).contiguous(), self.width
