"""The losses of draft training, in a module of their own because the command line needs no
torch."""

from enum import StrEnum


class LossKind(StrEnum):
    """The distance to the target's distribution to minimise, or plain next-token training."""

    kl = "kl"
    tvd = "tvd"
    tvd_plus_plus = "tvd++"
    next_token = "next-token"
