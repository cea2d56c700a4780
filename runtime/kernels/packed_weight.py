"""A matrix arranged for `kernel`, in the shortest type that holds its values exactly: products in float32 read half of it or all."""

import contextlib
import mmap

import torch
import torch.nn.functional as F

from runtime.kernels.jit import kernel
from runtime.kernels.llvm_ir import Arguments

SHORT = (torch.bfloat16, torch.float16)
SCAN = 1 << 18  # weights that are looked at together: they fit into a cache
PAGE = 1 << 21  # bytes of a large page of memory
ROWS = 70  # multiplied at once: more of them and a piece of the matrix no longer fit into a cache


def shortest(weight: torch.Tensor) -> torch.dtype:
    """The type of 16 bits that holds every weight exactly, float32 where there is none. Most published weights are in bfloat16."""
    for kind in SHORT:
        if all(
            torch.equal(part, part.to(kind).to(part.dtype))
            for part in weight.split(max(1, SCAN // weight.shape[1]))
        ):
            return kind
    return torch.float32


def room_for(shape: torch.Size, kind: torch.dtype) -> torch.Tensor:
    """Memory for what is read from end to end, in large pages where the system gives them to those who ask.

    Each page that is read has to be looked up, and a large one is 512 others: that saves 4 to 6 % of a product's time.
    """
    size = shape.numel() * kind.itemsize
    if size < PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=kind)
    memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % PAGE :][:size].view(kind).view(shape)


class Panels:
    """rows @ weight.T + bias on a CPU, computed in float32. What a row becomes depends on the row alone, bit for bit.

    `rows` (n, inner) -> (n, outer), in the type of the rows. Raises ValueError for other shapes.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, kind: torch.dtype) -> None:
        """`kind` holds the weights exactly. Raises what `kernel` raises."""
        self._kernel = kernel(kind)
        self._outer, self._inner = weight.shape
        panels = -(-self._outer // self._kernel.width)
        self._width = panels * self._kernel.width
        self._spare = self._width - self._outer
        halves = F.pad(weight.to(kind), (0, 0, 0, self._spare)).reshape(
            panels, 2, self._kernel.width // 2, self._inner
        )
        # In bfloat16 the halves of a line lie between each other: see `Program.widened`.
        lines = halves.permute((0, 3, 2, 1) if kind == torch.bfloat16 else (0, 3, 1, 2))
        self._matrix = room_for(lines.shape, kind).copy_(lines)
        self._bias = None if bias is None else F.pad(bias.float(), (0, self._spare))
        self._nothing = torch.zeros(self._width)

    def __call__(self, rows: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        """`onto` is added to the result."""
        if rows.dtype != torch.float32:
            return self(rows.float(), None if onto is None else onto.float()).to(rows.dtype)
        count, inner = rows.shape
        if inner != self._inner or (onto is not None and onto.shape != (count, self._outer)):
            added = "nothing" if onto is None else tuple(onto.shape)
            raise ValueError(
                f"rows {tuple(rows.shape)} onto {added} do not fit: the matrix is {self._outer} x {self._inner}"
            )
        rows = rows.contiguous()
        more, stride = self._more(onto)
        out = rows.new_empty(count, self._width)
        turned = rows if count == 1 else rows.new_empty(min(count, ROWS), self._inner)
        for first in range(0, count, ROWS):
            self._kernel(
                Arguments(
                    rows=rows.data_ptr() + 4 * first * self._inner,
                    turned=turned.data_ptr(),
                    count=min(ROWS, count - first),
                    inner=self._inner,
                    matrix=self._matrix.data_ptr(),
                    panels=self._matrix.shape[0],
                    onto=more.data_ptr() + 4 * first * stride,
                    onto_stride=stride,
                    out=out.data_ptr() + 4 * first * self._width,
                    out_stride=self._width,
                    shares=torch.get_num_threads(),
                )
            )
        return out[:, : self._outer].contiguous() if self._spare else out

    def _more(self, onto: torch.Tensor | None) -> tuple[torch.Tensor, int]:
        """What is added to the sums of each row, and its stride: 0 where it is the same for all."""
        if onto is None:
            return self._nothing if self._bias is None else self._bias, 0
        wide = F.pad(onto, (0, self._spare)) if self._spare else onto
        return (wide if self._bias is None else wide + self._bias).contiguous(), self._width
