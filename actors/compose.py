"""Composition: a target or a drafter from its configuration, on the machine this runs on. No Ray, no sockets."""

import importlib
import os
import sys
import time
from collections.abc import Callable

from transformers import PreTrainedTokenizerFast

from runtime.config import DrafterConfig, Placement, TargetConfig
from runtime.drafters.base import Ingredients
from runtime.drafting import DraftHost
from runtime.engine import Engine
from runtime.finish import Finish
from runtime.grower import Grower
from runtime.messages import Request
from runtime.models.choose import choose
from runtime.models.detokenize import Detokenizer
from runtime.models.hf import HFModel
from runtime.models.load import load_model, load_tokenizer
from runtime.models.timing import step_times
from runtime.schedulers.living import ROWS, Living
from runtime.target import Target

SWITCH_INTERVAL = 0.0002  # seconds; Python's own 5 ms would let the model's thread hold up the exchange


def settle(placement: Placement) -> None:
    """Stay on the given cores, from this thread on: the threads it starts inherit that."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    if placement.cores:
        os.sched_setaffinity(0, placement.cores)


def threads(placement: Placement) -> int | None:
    return placement.threads or len(placement.cores) or None


def end_tokens(model: HFModel, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Ids that end a text: the tokenizer's, and those of the model's generation settings."""
    settings = getattr(model.module, "generation_config", None)
    said = getattr(settings, "eos_token_id", None)
    listed = said if isinstance(said, list) else [said]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if isinstance(token, int))


def finisher(tokenizer: PreTrainedTokenizerFast, eos: frozenset[int]) -> Callable[[Request], Finish]:
    def finish(request: Request) -> Finish:
        text = Detokenizer(tokenizer.backend_tokenizer, request.prompt)
        return Finish(request.sampling, eos, text.decode, text.flush)

    return finish


def build_target(config: TargetConfig) -> tuple[Target, PreTrainedTokenizerFast]:
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, config.dtype, config.device, threads(config.placement))
    eos = end_tokens(model, tokenizer)
    engine = Engine(model, choose, Living(step_times(model, ROWS, time.monotonic)), eos, time.monotonic)
    return Target(engine, finisher(tokenizer, eos)), tokenizer


def build_drafter(config: DrafterConfig, target: str) -> DraftHost:
    """`target` is the name of the target's model: some methods read it, all speak its vocabulary."""

    def load(name: str) -> HFModel:
        return load_model(name, config.dtype, config.device, threads(config.placement))

    method = importlib.import_module(f"runtime.drafters.{config.method}")
    drafter = method.build(Ingredients(target, config.model, load))
    return DraftHost(Grower(drafter, config.name, config.width))
