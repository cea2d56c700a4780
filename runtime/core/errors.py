"""Everything that can go wrong, named by what the caller can do about it.

OutriderError
├── InvalidRequest      change the request
├── ModelRefused        choose another model, or repair its folder
├── PairMismatch        choose another draft for this target
├── LinkLost            nothing: the runtime goes on without that drafter
├── Overloaded          try again later
├── TargetsLost         change the request, or repair the cluster
└── Unavailable         start or repair the cluster
    └── TargetDied      nothing, as long as another target goes on
"""


class OutriderError(Exception):
    """One line that names the value and the way out."""


class InvalidRequest(OutriderError):
    """A parameter, a prompt or a message is outside what is allowed."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelRefused(OutriderError):
    """The model cannot be loaded, or cannot be rolled back exactly."""


class PairMismatch(OutriderError):
    """Target and draft do not speak the same vocabulary."""


class LinkLost(OutriderError):
    """A drafter cannot be reached, or broke the protocol."""


class Overloaded(OutriderError):
    """A bound is reached: too many sessions, a full queue."""


class TargetsLost(OutriderError):
    """Targets died one after the other while they held the request. No other target is given it."""


class Unavailable(OutriderError):
    """No cluster, no port, no target."""


class TargetDied(Unavailable):
    """The target was lost while it held the request, which may be the cause."""


# What a request, a model, a tokenizer or a drafting method may raise: it ends that session alone.
# Any other error is a fault of the loop that meets it.
SESSION_FAULTS = (
    OutriderError,
    RuntimeError,
    ValueError,
    MemoryError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
)
