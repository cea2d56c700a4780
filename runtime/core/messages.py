"""Defines the messages between targets and drafters, and the output of a target.

All are frozen; nobody writes to their arrays.
"""

from dataclasses import dataclass, field, fields
from itertools import zip_longest
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from runtime.core.features import FeatureRows, FeatureSpec
from runtime.core.sampling_params import SamplingParams

Key = int  # 64-bit content name of a token prefix (runtime.core.tree)
Tokens = tuple[int, ...]
FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a tree that a drafter owns: branches whose root's key is `index` modulo `of`.

    With `of` 0 the drafter owns nothing and rests.
    """

    session: str
    index: int
    of: int


@dataclass(frozen=True, slots=True)
class Style:
    """Sets how a scheduler wants the tree to grow; 0 leaves a value to the drafter.

    width     leaves expanded in one forward pass
    branches  children of a leaf
    passes    forward passes after an open or a commit; the drafter then waits for the next commit

    The living tree leaves all three to the drafter.
    """

    width: int = 0
    branches: int = 0
    passes: int = 0


DEFAULT_STYLE = Style()


@dataclass(frozen=True, slots=True)
class Open:
    """Starts a session, or restarts it for a drafter that has lost it.

    `tokens` are all committed tokens, prompt included; the first `prompt` of them are the user's.
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
    """Tokens that the target has decided, which follow the first `base` tokens.

    `key` is the key of the resulting text.
    """

    session: str
    epoch: int
    base: int
    tokens: Tokens
    key: Key


@dataclass(frozen=True, slots=True)
class Close:
    """Ends a session; the drafter drops its state."""

    session: str


@dataclass(frozen=True, slots=True)
class Features:
    """Hidden states of the target, for a drafter that has asked for them.

    They arrive in order of position, those of a committed text before the Commit that follows it.
    """

    session: str
    epoch: int
    rows: FeatureRows


Event = Open | Commit | Share | Close | Features


@dataclass(frozen=True, slots=True)
class Draft:
    """New nodes of one session's tree, as parallel arrays, parents before their children.

    parents  uint64 (n,)   key of the parent
    tokens   int32 (n,)    token id
    scores   float32 (n,)  log of the drafter's estimate of acceptance after the parent; at most 0
    """

    session: str
    epoch: int
    drafter: str
    parents: npt.NDArray[np.uint64]
    tokens: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Resync:
    """Asks for a new Open: the drafter's text differs from the target's."""

    session: str
    drafter: str


@dataclass(frozen=True, slots=True)
class FeatureRequest:
    """Asks for hidden states of the target: the first reply of a drafter that needs them, and sent
    once. A target that cannot serve it ends the link.
    """

    spec: FeatureSpec
    drafter: str


Reply = Draft | Resync | FeatureRequest


@dataclass(frozen=True, slots=True)
class Request:
    """A request to a target.

    committed  output tokens decided earlier, by a target that has died
    epoch      incarnation of the session: one more with each target that takes it over
    deadline   seconds until the request expires; None: never
    max_rows   most tree nodes to verify in a step; None: as many as pay off
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
class StandbyText:
    """More of a text that another target writes: the tokens from position `start` on.

    over  the text is not needed any more; there are no tokens
    """

    session: str
    start: int = 0
    tokens: Tokens = ()
    over: bool = False


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural logarithms of the target's probabilities, before temperature and filters.

    `chosen` is for the output token; `top` lists the most likely tokens as (token id, logprob),
    highest first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of output, as parallel tuples.

    pieces    text that became final with each token; "" while it is held back or incomplete
    tokens    token ids
    drafters  who guessed each token; "" for the target itself
    logprobs  one per token if the request asked for them; else empty

    A chunk without tokens may have one piece: the text that was held back, at the deadline.

    `prompt_logprobs`, if the request asked for them, are those of the next tokens of the prompt.
    They come while the prompt is read, from its second token on, before all tokens.
    """

    pieces: tuple[str, ...]
    tokens: Tokens
    drafters: tuple[str, ...]
    finish_reason: FinishReason | None = None
    stats: "Stats | None" = None
    error: str = ""
    logprobs: tuple[Logprob, ...] = ()
    prompt_logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Round:
    """One target step of one session, times in seconds. All metrics derive from these records."""

    session: str
    number: int
    width: int  # rows in addition to the root
    accepted: int  # rows on the path that the target took
    hit: bool  # the new root was already a node of the tree
    waited: float
    computed: float
    bookkeeping: float
    ridden: float = 0.0  # of `computed`, for pseudo rows
    expected: float = 0.0  # rows on the path, by what was known before the step


@dataclass(frozen=True, slots=True)
class Stats:
    """Cost and benefit of a finished session, times in seconds."""

    prompt_tokens: int
    completion_tokens: int
    rounds: int
    drafted: int  # nodes that drafters added to the tree
    verified: int  # drafted nodes that got a row
    accepted: int  # verified nodes that were delivered
    hits: int
    # Rounds that verified guesses, by the number of guesses accepted
    histogram: tuple[int, ...]
    by_drafter: dict[str, int] = field(default_factory=dict)  # accepted tokens
    ignored: dict[str, int] = field(default_factory=dict)  # nodes without effect, by reason
    elapsed: float = 0.0  # from the arrival of the request to its last token
    prefill: float = 0.0
    reused: int = 0  # prompt tokens found in a KV cache
    waited: float = 0.0
    computed: float = 0.0
    bookkeeping: float = 0.0

    def __add__(self, other: "Stats") -> "Stats":
        """Add field by field: times are summed, histograms position by position, dicts by key."""
        return Stats(
            *(
                add_values(getattr(self, each.name), getattr(other, each.name))
                for each in fields(self)
            )
        )


NO_STATS = Stats(0, 0, 0, 0, 0, 0, 0, ())


def add_values(one: Any, other: Any) -> Any:
    """Add two values of one field of Stats."""
    match one:
        case tuple():
            return tuple(map(sum, zip_longest(one, other, fillvalue=0)))
        case dict():
            return {key: one.get(key, 0) + other.get(key, 0) for key in one | other}
        case _:
            return one + other
