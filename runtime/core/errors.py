"""Defines the errors, grouped by what the caller can do about them.

OutriderError
├── InvalidRequest      change the request
├── ModelRefused        choose another model, or repair its folder
├── PairMismatch        choose another draft for this target
├── LinkLost            nothing: the runtime continues without that drafter
├── Overloaded          try again later
├── TargetsLost         change the request, or repair the cluster
└── Unavailable         start or repair the cluster
    └── TargetDied      nothing, while another target is running
"""

from collections.abc import Iterator
from contextlib import contextmanager


class OutriderError(Exception):
    """Carries one line that names the offending value and the way out."""


class InvalidRequest(OutriderError):
    """A parameter, a prompt or a message is out of range. `param` names it, if known."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelRefused(OutriderError):
    """The model cannot be loaded, or cannot be rolled back exactly."""


class PairMismatch(OutriderError):
    """Target and draft model have different vocabularies."""


class LinkLost(OutriderError):
    """A drafter is unreachable or violated the protocol."""


class Overloaded(OutriderError):
    """A limit is reached: too many sessions, or a full queue."""


class TargetsLost(OutriderError):
    """Several targets died in turn while they ran the request; it is not retried again."""


class Unavailable(OutriderError):
    """The cluster, a port or a target is missing."""


class TargetDied(Unavailable):
    """The target died while it ran the request, which may be the cause."""


# Errors that a request, a model, a tokenizer or a drafting method may raise: they end only the
# session in question. Any other error is a bug in the loop that catches it.
SESSION_FAULTS = (
    OutriderError,
    RuntimeError,
    ValueError,
    MemoryError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    OSError,
)


@contextmanager
def naming(model: str) -> Iterator[None]:
    """Makes a failure of another library in the block a ModelRefused that names the model."""
    try:
        yield
    except OutriderError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise ModelRefused(
            f"model {model} cannot be started ({why}): choose another model, "
            "or give it more memory if that is the reason"
        ) from error
