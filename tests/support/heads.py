"""Mounts heads on an engine with a toy model."""

import itertools

from runtime.core.sampler_reference import Sampler
from runtime.heads.base import Head
from runtime.models.base import Model
from runtime.models.sampler import choose
from runtime.models.toy import ToyModel
from runtime.schedulers.fixed import Fixed
from runtime.target.engine import Engine
from runtime.target.head_runner import MountedHead
from runtime.target.verifier import Verifier
from tests.support.harness import NOBODY, continued

PROMPT = (3, 1, 4, 1, 5, 9, 3, 1, 4, 1)
TOY = ToyModel(vocabulary=24, memory=3)
TEXT = continued(TOY, PROMPT, 100)


def headed(model: Model, *mounted: Head, rows: int = 8, chooser: Sampler = choose) -> Engine:
    """Returns an engine with heads h-0, h-1, ... whose clock ticks at each reading."""
    ticks = itertools.count()
    named = {f"h-{number}": MountedHead(head) for number, head in enumerate(mounted)}
    return Engine(
        model, Verifier(chooser, NOBODY), Fixed(rows), lambda: float(next(ticks)), heads=named
    )
