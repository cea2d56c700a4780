"""The interface of a model: one forward pass over rows of a tree, with a cache that rolls back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from runtime.core.features import LayerFeatures
from runtime.kv.base import KVCache

# Logits stay on the model's device, as a torch tensor (rows, vocabulary) in float32, or as a
# numpy array from the toy model. Only a Chooser and the drafter of the same family look inside.
Logits = Any


@dataclass(frozen=True, slots=True)
class Rows:
    """The input of a forward pass: n new rows after a cache with a prefix and perhaps tree slots.

    tokens     int64 (n,)
    positions  int64 (n,): position of each token in its text, from 0
    prefix     slots [0, prefix) of the cache are visible to every row
    visible    bool (n, cache.length - prefix + n): the later slots that each row attends to, the
               rows' own slots included; a row always sees itself
    """

    tokens: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    prefix: int
    visible: npt.NDArray[np.bool_]


def causal(tokens: npt.NDArray[np.int64], start: int) -> Rows:
    """Return rows of plain text that continues a cache of `start` slots."""
    n = len(tokens)
    return Rows(tokens, np.arange(start, start + n), start, np.tri(n, dtype=np.bool_))


@dataclass(frozen=True, slots=True)
class PassInput:
    """One text's share of a packed pass.

    last         compute logits only for the last `last` rows (0: none; None: all)
    branch_rows  rows that pseudo rows branch from, see Branch
    """

    cache: KVCache
    rows: Rows
    last: int | None = None
    branch_rows: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Branch:
    """A pseudo row for each branch row. It has no token and enters above the first `layer` layers.

    There `map`, (n, d) -> (n, d), computes its state from the state of the branch row. The i-th
    branch of a pass, from 0, stands i + 1 positions after its row. It sees what that row sees, the
    row itself, and the earlier branches of that row. No other row sees a pseudo row, and nothing of
    it stays in a cache.
    """

    layer: int
    map: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """The outputs of a pass besides logits.

    hidden    return the states from which the logits are computed
    branches  pseudo rows to compute, with layers that do not fall
    features  rising layers whose states to return, see runtime.core.features.FeatureSpec
    """

    hidden: bool = False
    branches: tuple[Branch, ...] = ()
    features: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PassOutput:
    """The outputs of a pass for one text.

    logits         (rows, vocabulary), as `Model.forward` returns them
    hidden         (rows, d) if requested: the input of `unembed`
    branch_logits  (branch rows, branches, vocabulary) float32 of pseudo rows; None without any
    features       of all rows of the part, whatever `last` is, if requested; they may have more
                   layers than this caller asked for: `features.of(layers)` picks its own
    """

    logits: Logits
    hidden: Any = None
    branch_logits: Any = None
    features: LayerFeatures | None = None


class Model(Protocol):
    """A decoder-only language model. It is not thread-safe."""

    @property
    def name(self) -> str: ...

    @property
    def vocabulary(self) -> int:
        """Number of token ids, which is the number of columns of the logits."""
        ...

    @property
    def context(self) -> int:
        """Maximum number of tokens of a text, output included."""
        ...

    def new_cache(self) -> KVCache:
        """Return an empty cache for one text."""
        ...

    def forward(self, cache: KVCache, rows: Rows, last: int | None = None) -> Logits:
        """Run one pass: append the rows to `cache` and return the float32 logits after each of
        them.

        With `last`, only the last `last` rows get logits. On an error the cache is unchanged.
        """
        ...

    def forward_all(self, parts: Sequence[PassInput]) -> list[Logits]:
        """Run one pass over rows of several texts, each with its own cache.

        Returns for each part what `forward` would return. The weights are read once for all parts.
        On an error all caches are unchanged.
        """
        ...


@runtime_checkable
class HiddenStateModel(Model, Protocol):
    """A Model in torch that returns hidden states and pseudo rows as well as logits."""

    @property
    def device(self) -> Any: ...

    @property
    def dtype(self) -> Any:
        """Type of the hidden states."""
        ...

    @property
    def hidden_size(self) -> int:
        """Numbers of a layer's state."""
        ...

    @property
    def slot_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        ...

    def check(self, output_spec: OutputSpec) -> None:
        """Raises ModelRefused where this cannot be shown."""
        ...

    def forward_outputs(
        self, parts: Sequence[PassInput], output_spec: OutputSpec
    ) -> list[PassOutput]:
        """Run `forward_all` and return the requested outputs.

        There may be logits for more rows than a part's `last`; those rows come first.
        """
        ...

    def embeddings(self) -> tuple[Any, Any]:
        """Return the token embeddings and the unembedding, each (vocabulary, d).

        Raises ModelRefused if there are none.
        """
        ...

    def unembed(self, hidden: Any) -> Logits:
        """Return float32 logits (rows, vocabulary) of hidden states (rows, d) from
        `forward_outputs`.
        """
        ...


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """A target as a trained head knows it. `tokenizer` is the hash of its vocabulary."""

    hidden_size: int
    layers: int
    vocabulary: int
    tokenizer: str
