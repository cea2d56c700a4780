"""What the runtime asks of a model: one forward pass over rows of a tree, with a cache that rolls back exactly."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from runtime.kv.base import KVCache

# Logits stay where the model computed them: a torch tensor (rows, vocabulary) in float32 on the model's device, or a
# numpy array from the toy model. Only a Chooser and the drafter of the same family look inside.
Logits = Any


@dataclass(frozen=True, slots=True)
class Rows:
    """The input of one forward pass: n new rows behind a cache that holds a prefix and, perhaps, tree slots.

    tokens     int64 (n,)
    positions  int64 (n,)  place of each token in its text, from 0
    prefix     slots [0, prefix) of the cache are visible to every row
    visible    bool (n, cache.length - prefix + n): which later slots each row attends to, the rows' own slots included
               (a row always sees itself)
    """

    tokens: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    prefix: int
    visible: npt.NDArray[np.bool_]


def causal(tokens: npt.NDArray[np.int64], start: int) -> Rows:
    """Rows of plain text that continues a cache of `start` slots."""
    n = len(tokens)
    return Rows(tokens, np.arange(start, start + n), start, np.tri(n, dtype=np.bool_))


@dataclass(frozen=True, slots=True)
class PassInput:
    """One text's share of a packed pass. With `last`, logits are computed for the last `last` rows only (0: for none).

    `branch_rows`: those of its rows that pseudo rows ride beside, where a pass has any (see Branch).
    """

    cache: KVCache
    rows: Rows
    last: int | None = None
    branch_rows: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Branch:
    """A pseudo row for each rider: it has no token, and begins above the first `layer` layers.

    There `map` makes its state, (n, d) -> (n, d), out of that of the row it rides beside. The i-th branch of a pass, from 0, stands i + 1
    places behind its row and sees what the row sees, the row, and the branches of that row before it. No row sees a pseudo row, and
    nothing of it stays in a cache.
    """

    layer: int
    map: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """What of a pass is wanted beside its logits: the states that they are made of; branches, whose layers do not fall."""

    hidden: bool = False
    branches: tuple[Branch, ...] = ()


@dataclass(frozen=True, slots=True)
class PassOutput:
    """What a pass has computed of one part.

    logits  (rows, vocabulary), as `Model.forward` returns them
    hidden  (rows, d) where they were wanted: what `unembed` makes the logits of
    ridden  (riders, branches, vocabulary) float32, of pseudo rows; None where the part had none
    """

    logits: Logits
    hidden: Any = None
    branch_logits: Any = None


class Model(Protocol):
    """A decoder-only language model. Not safe for use by two threads at a time."""

    @property
    def name(self) -> str: ...

    @property
    def vocabulary(self) -> int:
        """Number of token ids: logits have that many columns."""
        ...

    @property
    def context(self) -> int:
        """The most tokens that a text may have, output included."""
        ...

    def new_cache(self) -> KVCache:
        """An empty cache for one text."""
        ...

    def forward(self, cache: KVCache, rows: Rows, last: int | None = None) -> Logits:
        """One pass: appends the rows to `cache` and returns the logits that follow each of them.

        With `last`, only those of the last `last` rows are computed. float32 in any case. On an error the cache is as before.
        """
        ...

    def forward_all(self, parts: Sequence[PassInput]) -> list[Logits]:
        """One pass over the rows of several texts, each with its own cache: for each part what `forward` would return.

        The weights are read once for all of them. On an error all caches are as before.
        """
        ...


class HiddenStateModel(Model, Protocol):
    """A Model in torch that shows more of a pass than logits."""

    @property
    def device(self) -> Any: ...

    @property
    def dtype(self) -> Any:
        """Of its states."""
        ...

    def check(self, output_spec: OutputSpec) -> None:
        """Raises ModelRefused where this cannot be shown."""
        ...

    def forward_outputs(
        self, parts: Sequence[PassInput], output_spec: OutputSpec
    ) -> list[PassOutput]:
        """`forward_all`, and what was looked at. Logits may be there for more rows than a part's `last`, before those."""
        ...

    def unembed(self, hidden: Any) -> Logits:
        """float32 (rows, vocabulary) of states (rows, d) such as `forward_outputs` shows."""
        ...


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """A target as a trained head knows it. `tokenizer` is the hash of its vocabulary."""

    hidden_size: int
    layers: int
    vocabulary: int
    tokenizer: str
