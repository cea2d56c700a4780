"""The interface of a drafting method. A new method is one file in this folder with a `build()`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from runtime.core.draft_nodes import DraftNodes
from runtime.core.features import FeatureRows, FeatureSpec
from runtime.core.sampling_params import SamplingParams
from runtime.core.tree import TokenTree
from runtime.models.base import HiddenStateModel, Model


@dataclass(frozen=True, slots=True)
class Text:
    """One session as a drafter sees it.

    session   its name
    tokens    committed tokens
    prompt    number of tokens that came from the user
    sampling  the session's sampling parameters
    tree      guesses that continue the text; the root is the last of `tokens`
    features  the target's hidden states, as far as they have arrived: of consecutive tokens, never
              of the last one, which the target has not read yet; None without any
    """

    session: str
    tokens: Sequence[int]
    prompt: int
    sampling: SamplingParams
    tree: TokenTree
    features: FeatureRows | None = None


@dataclass(frozen=True, slots=True)
class ExpandRequest:
    """Asks for children of nodes of one session's tree.

    A node that was answered is not asked about again.

    text      the session
    leaves    indices of the nodes
    branches  children per node; 0 leaves the number to the method
    """

    text: Text
    leaves: Sequence[int]
    branches: int = 0


class Drafter(Protocol):
    """Proposes continuations. It may be wrong or silent; the target trusts nothing it returns."""

    @property
    def feature_spec(self) -> FeatureSpec | None:
        """Return the hidden states of the target that the method needs, which never change; None if
        it needs none.
        """
        ...

    def expand(self, requests: Sequence[ExpandRequest]) -> Sequence[DraftNodes | None]:
        """Guess the children of leaves of several sessions, with at most one request per session.

        The answers are parallel to the requests. A method with a model runs one forward pass for
        all requests. It may omit children of a leaf; the host does not ask again. None means that
        the method is still reading a long text; the host asks again. If one request fails the whole
        call raises, and the host may ask any of them again.
        """
        ...

    def close(self, session: str) -> None:
        """Forget a session that has ended; an unknown session is no error.

        Caches of its text may serve later texts with the same prefix.
        """
        ...


@dataclass(frozen=True, slots=True)
class DrafterContext:
    """The models that a method's `build()` may use, and functions that load them on this drafter's
    device.

    target        name of the target
    draft         name of the draft, or the folder of the trained weights
    load          loads a whole model
    load_layers   loads the configured layers, by default every second one
    load_changed  loads the layers with the given numbers, then lets a function change the module
    dtype, device, threads
                  as in runtime.models.loader.load_model, for methods that load parts of a model
    tokens        size of the draft's own vocabulary; None: as large as the model
    unknown       id that the draft reads for tokens that it does not know
    """

    target: str
    draft: str
    load: Callable[[str], Model]
    load_layers: Callable[[str], Model]
    load_changed: Callable[[str, Sequence[int], Callable[[Any], None]], HiddenStateModel]
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    tokens: int | None = None
    unknown: int = 0
