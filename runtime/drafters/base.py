"""What a drafting method promises. A new method is one new file in this folder with a `build()`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from runtime.core.draft_nodes import DraftNodes
from runtime.core.sampling_params import SamplingParams
from runtime.core.tree import TokenTree
from runtime.models.base import HiddenStateModel, Model


@dataclass(frozen=True, slots=True)
class Text:
    """One session as a drafter sees it: what is committed, and the tree of guesses that continues it.

    The root of `tree` is the last of `tokens`; `prompt` of them came from the user.
    """

    session: str
    tokens: Sequence[int]
    prompt: int
    sampling: SamplingParams
    tree: TokenTree


@dataclass(frozen=True, slots=True)
class ExpandRequest:
    """Nodes of one session's tree (indices) whose children are wanted; a node that was answered for is not asked about again.

    `branches`: so many children of each; 0 leaves it to the method.
    """

    text: Text
    leaves: Sequence[int]
    branches: int = 0


class Drafter(Protocol):
    """Anything that proposes continuations. It may be wrong or silent; nothing it says is trusted."""

    def expand(self, requests: Sequence[ExpandRequest]) -> Sequence[DraftNodes | None]:
        """Guess the children of the leaves of several sessions, of each session at most one wish; the answers are parallel.

        One forward pass for all of them where the method has a model. Nothing need be returned for a leaf that the method
        has no opinion on; the host does not ask again. None asks for patience, while a long text is read: the host asks
        again. Where one wish cannot be answered the whole call raises, and any of them may be asked again.
        """
        ...

    def close(self, session: str) -> None:
        """The session is over, and its name means nothing any more; no error where nothing is kept. What was read of its text
        may serve later texts that begin alike."""
        ...


@dataclass(frozen=True, slots=True)
class DrafterContext:
    """What a method's `build()` may use: names of models, or the folder of what was trained, and the ways to load one on this drafter's
    device.

    load          whole
    load_layers   in part: the layers that were configured, else every second
    load_changed  in part: the layers of these numbers, once the function has changed the module that they make
    """

    target: str
    draft: str
    load: Callable[[str], Model]
    load_layers: Callable[[str], Model]
    load_changed: Callable[[str, Sequence[int], Callable[[Any], None]], HiddenStateModel]
