"""What a draft model can be trained towards. Apart from the losses, so that a command line that names them needs no torch."""

from enum import StrEnum


class LossKind(StrEnum):
    """The distance to the target's distribution that is made small; or the next token alone, as language models are trained."""

    kl = "kl"
    tvd = "tvd"
    tvd_plus_plus = "tvd++"
    next_token = "next-token"
