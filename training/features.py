"""What EAGLE learns from: texts with the target's states at each of their tokens, computed once.

They are kept as memory-mapped bfloat16 files, because they are larger than the texts by a factor of
a thousand.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.core.messages import Tokens
from runtime.models.layer_states import recorded
from training.folder import write_atomically
from training.teacher import Teacher, fast_copy

BATCH_TOKENS = 4096  # of one pass of the target
TAPS, LAST, COUNT = "taps.bin", "last.bin", "texts-done"


@dataclass(frozen=True, slots=True)
class Features:
    """Texts one after the other, N tokens in all, with T layers of states of size d.

    tokens  int64 (N,)
    texts   int64 (N,), the number of each token's text
    taps    bfloat16 (N, T * d), states at the layers of the shape
    last    bfloat16 (N, d), states after the final norm
    """

    tokens: Tensor
    texts: Tensor
    taps: Tensor
    last: Tensor

    def rows(self, at: Tensor) -> "Features":
        """Return copies of the given rows, of any shape, in place of N."""
        return Features(self.tokens[at], self.texts[at], self.taps[at], self.last[at])


def read_features(module: Any, layers: Sequence[int], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return taps (batch, n, T * d) and last states (batch, n, d) of token ids (batch, n)."""
    with torch.no_grad(), recorded(module, layers) as found:
        last = module.base_model(rows.to(module.device), use_cache=False).last_hidden_state
    taps = torch.cat([states for (states,) in found], dim=-1)
    return taps.unflatten(0, rows.shape), last


def open_features(
    teacher: Teacher,
    layers: Sequence[int],
    texts: Sequence[Tokens],
    folder: Path,
    tell: Callable[[int], None],
) -> Features:
    """Return the features of the texts, from `folder` as far as they are there.

    `tell` receives the number of texts that have been read since the last call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lengths = torch.tensor([len(text) for text in texts])
    total, d = int(lengths.sum()), teacher.hidden_size
    starts = lengths.cumsum(0) - lengths
    taps, last = (
        torch.from_file(
            str(folder / name), shared=True, size=total * width, dtype=torch.bfloat16
        ).view(total, width)
        for name, width in ((TAPS, len(layers) * d), (LAST, d))
    )
    done = int((folder / COUNT).read_text()) if (folder / COUNT).exists() else 0
    tell(done)
    module = fast_copy(teacher) if done < len(texts) else None
    for group in groups_by_length(lengths.tolist(), done):
        read_group(module, layers, [texts[number] for number in group], taps, last, starts[group])
        write_atomically(folder / COUNT, str(group[-1] + 1).encode())
        tell(len(group))
    return Features(
        torch.tensor([token for text in texts for token in text]),
        torch.arange(len(texts)).repeat_interleave(lengths),
        taps,
        last,
    )


def groups_by_length(lengths: Sequence[int], done: int) -> list[list[int]]:
    """Return the numbers of the texts from `done` on, in order, in groups that fit a pass padded to
    the longest."""
    groups: list[list[int]] = []
    longest = 0
    for number in range(done, len(lengths)):
        longest = max(longest, lengths[number])
        if not groups or longest * (len(groups[-1]) + 1) > BATCH_TOKENS:
            groups.append([])
            longest = lengths[number]
        groups[-1].append(number)
    return groups


def read_group(
    module: Any,
    layers: Sequence[int],
    texts: Sequence[Tokens],
    taps: Tensor,
    last: Tensor,
    starts: Tensor,
) -> None:
    """Write the features of some texts to their places. Padding follows a text, which does not see
    it."""
    rows = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    found, final = read_features(module, layers, rows)
    for number, (text, start) in enumerate(zip(texts, starts.tolist(), strict=True)):
        taps[start : start + len(text)] = found[number, : len(text)].to(taps)
        last[start : start + len(text)] = final[number, : len(text)].to(last)
