"""Measurements of a model pair and its devices: everything that a forecast needs.

The file format is JSON; times are in seconds.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError, field_validator, model_validator

from runtime.config import StrictModel
from runtime.core.errors import InvalidRequest

Seconds = Annotated[float, Field(gt=0, lt=1e6, allow_inf_nan=False)]
Cost = Annotated[float, Field(ge=0, lt=1e6, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Score = Annotated[float, Field(le=0, allow_inf_nan=False)]


class Position(StrictModel):
    """One position of the target's own text.

    rank    rank of the target's choice among the draft's guesses, from 0; None if it was not among
            them
    scores  log probabilities that the draft gave to its best guesses, falling
    below   what the same pass guessed after its best guess, after the best guess of those, and so
            on; nothing follows a best guess that was wrong
    """

    rank: Annotated[int, Field(ge=0)] | None
    scores: tuple[Score, ...] = Field(min_length=1)
    below: tuple["Position", ...] = ()


class PairProfile(StrictModel):
    """A target, a draft and the network between them.

    target, draft  T(n) and t(w): seconds of a pass by its rows, extrapolated linearly
    acceptance     by number k of guesses: the share of positions at which the draft's first k
                   contain the target's choice
    positions      what a replay of the draft on the target's texts found, in order; preferred over
                   `acceptance`
    rtt            round trip between target and drafter
    text           added to a target's pass by each text beyond the first
    beside         slowdown of a target's pass while a drafter computes, since they may share memory
    step           the target's bookkeeping per step and session
    message        the target's bookkeeping per growth that arrives
    pass_          ("pass" in JSON) a drafter's bookkeeping per pass
    """

    name: str = "draft"
    target: dict[int, Seconds]
    draft: dict[int, Seconds]
    acceptance: dict[int, Share] = Field(default={})
    positions: tuple[Position, ...] = ()
    rtt: Cost = 0.001
    text: Cost = 0.0
    beside: Annotated[float, Field(ge=1, lt=1e3, allow_inf_nan=False)] = 1.0
    step: Cost = 0.0
    message: Cost = 0.0
    pass_: Cost = Field(default=0.0, alias="pass")

    @field_validator("target", "draft")
    @classmethod
    def from_one_row(cls, times: dict[int, float]) -> dict[int, float]:
        if 1 not in times or min(times) < 1:
            raise ValueError(
                "give the time of 1 row, and of more than that as far as they were measured"
            )
        return times

    @field_validator("acceptance")
    @classmethod
    def rising(cls, rates: dict[int, float]) -> dict[int, float]:
        ordered = [rates[k] for k in sorted(rates)]
        if rates and (1 not in rates or min(rates) < 1 or ordered != sorted(ordered)):
            raise ValueError("give the rate of 1 guess; with more guesses it does not fall")
        return rates

    @model_validator(mode="after")
    def enough(self) -> "PairProfile":
        if not (self.acceptance or self.positions):
            raise ValueError("give acceptance or positions")
        return self


def positions(
    ranks: npt.NDArray[np.int64], scores: npt.NDArray[np.float32]
) -> tuple[Position, ...]:
    """Convert a replay (runtime.models.acceptance.Replay) to positions."""
    pairs = zip(ranks.tolist(), scores.astype(np.float64).round(4).tolist(), strict=True)
    return tuple(
        Position(rank=None if rank < 0 else rank, scores=tuple(min(0.0, score) for score in of))
        for rank, of in pairs
    )


def read_profile(file: Path) -> PairProfile:
    """Read a profile. Raises InvalidRequest that names the first invalid key or value."""
    try:
        return PairProfile.model_validate_json(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"{file} cannot be read: give a file of measurements, as plan --save writes it",
            "measured",
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"{file}: {where or 'content'}: {first['msg']}", "measured") from error
