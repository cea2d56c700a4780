"""The values that travel between target and drafters, and out of the target. Frozen; arrays in them are never written to."""

from dataclasses import dataclass, field, fields
from itertools import zip_longest
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from runtime.core.sampling_params import SamplingParams

Key = int  # 64-bit content name of a token prefix (runtime.core.tree)
Tokens = tuple[int, ...]
FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of the tree a drafter owns: branch roots whose key is `index` modulo `of`. With `of` 0 it owns none, and rests."""

    session: str
    index: int
    of: int


@dataclass(frozen=True, slots=True)
class Style:
    """How a schedule wants the tree to grow; 0 leaves the choice to the drafter. The living tree leaves all of it.

    width     leaves expanded in one forward pass
    branches  children of a leaf
    passes    forward passes after a commit, or after the opening; then the drafter rests until the next commit
    """

    width: int = 0
    branches: int = 0
    passes: int = 0


DEFAULT_STYLE = Style()


@dataclass(frozen=True, slots=True)
class Open:
    """A session begins, or begins again for a drafter that has lost it.

    `tokens` are all tokens committed so far, prompt included; `prompt` is how many of them came from the user.
    """

    session: str
    epoch: int
    tokens: Tokens
    prompt: int
    sampling: SamplingParams
    share: Share
    style: Style = DEFAULT_STYLE


@dataclass(frozen=True, slots=True)
class Commit:
    """Tokens that the target has decided: they follow the first `base` tokens; `key` names the text they make."""

    session: str
    epoch: int
    base: int
    tokens: Tokens
    key: Key


@dataclass(frozen=True, slots=True)
class Close:
    """The session is over; nothing of it need be kept."""

    session: str


Event = Open | Commit | Share | Close


@dataclass(frozen=True, slots=True)
class Draft:
    """Growth: new nodes of one session's tree, as parallel arrays of equal length. Parents come before their children.

    parents  uint64 (n,)   key of each node's parent
    tokens   int32 (n,)    its token id
    scores   float32 (n,)  log of the drafter's own estimate that the target chooses it after its parent; at most 0
    """

    session: str
    epoch: int
    drafter: str
    parents: npt.NDArray[np.uint64]
    tokens: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Resync:
    """A drafter has noticed that its text is not the target's: please open the session again."""

    session: str
    drafter: str


Reply = Draft | Resync


@dataclass(frozen=True, slots=True)
class Request:
    """What a caller asks of a target.

    committed  output tokens decided before, by a target that is gone
    epoch      which life of the session: one more with each target that takes it over
    deadline   seconds after which nobody wants the rest any more; None: whenever
    max_rows   tree nodes that a step may verify for it; None: as many as pay
    """

    session: str
    prompt: Tokens
    sampling: SamplingParams
    speculation: bool = True
    committed: Tokens = ()
    epoch: int = 0
    deadline: float | None = None
    max_rows: int | None = None


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural logarithms of the target's own probabilities, before temperature and filters: of the token that was chosen, and of the
    most likely ones (token id, logprob), falling."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of output, as parallel tuples.

    pieces    the text that became certain with each token (held back or inside a character: "")
    drafters  who guessed each token; "" = nobody, the target's own
    logprobs  of each token, where the request asked for them; else empty
    """

    pieces: tuple[str, ...]
    tokens: Tokens
    drafters: tuple[str, ...]
    finish_reason: FinishReason | None = None
    stats: "Stats | None" = None
    error: str = ""
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Round:
    """One target step of one session; times in seconds. The only record that metrics are made of."""

    session: str
    number: int
    width: int  # rows beside the root
    accepted: int  # of them, on the path that the target took
    hit: bool  # the new root was already a node of the mirror
    waited: float
    computed: float
    bookkeeping: float
    ridden: float = 0.0  # of `computed`, for pseudo rows


@dataclass(frozen=True, slots=True)
class Stats:
    """What a finished session cost and gained; times in seconds."""

    prompt_tokens: int
    completion_tokens: int
    rounds: int
    drafted: int  # nodes that arrived from drafters and were put into the mirror
    verified: int  # of them, given a row
    accepted: int  # of them, delivered
    hits: int
    histogram: tuple[
        int, ...
    ]  # rounds in which guesses were verified, by how many of them were accepted
    by_drafter: dict[str, int] = field(default_factory=dict)  # accepted tokens of each
    ignored: dict[str, int] = field(default_factory=dict)  # messages without effect, by reason
    elapsed: float = 0.0  # from the taking of the request to its last token
    prefill: float = 0.0
    reused: int = 0  # prompt tokens whose keys and values were there already
    waited: float = 0.0
    computed: float = 0.0
    bookkeeping: float = 0.0

    def __add__(self, other: "Stats") -> "Stats":
        """Adds field by field, elapsed times too; histograms by place, dicts by key."""
        return Stats(
            *(
                add_values(getattr(self, each.name), getattr(other, each.name))
                for each in fields(self)
            )
        )


NO_STATS = Stats(0, 0, 0, 0, 0, 0, 0, ())


def add_values(one: Any, other: Any) -> Any:
    """Adds two values of a field of Stats."""
    match one:
        case tuple():
            return tuple(map(sum, zip_longest(one, other, fillvalue=0)))
        case dict():
            return {key: one.get(key, 0) + other.get(key, 0) for key in one | other}
        case _:
            return one + other
