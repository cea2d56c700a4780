"""Builds a target or a drafter from its configuration, on this machine, without Ray and sockets."""

import gc
import importlib
import os
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from actors.calibration_store import load_calibrations, load_target_state, target_state_file
from runtime.config import TRAINED_METHODS, DrafterConfig, HeadConfig, Placement, TargetConfig
from runtime.core.messages import Request
from runtime.draft.draft_engine import DraftEngine
from runtime.draft.draft_host import DraftHost
from runtime.drafters.base import Drafter, DrafterContext
from runtime.drafters.block import BlockDrafter
from runtime.drafters.eagle import EagleDrafter
from runtime.drafters.model import ModelDrafter
from runtime.drafters.noisy import NoisyDrafter
from runtime.heads.base import Head, HeadContext
from runtime.method_registry import module_name
from runtime.model_paths import draft_model, drafter_calibration_file, head_folder
from runtime.models.detokenize import Detokenizer
from runtime.models.eagle_pass import guess_times
from runtime.models.grammar import GrammarCompiler
from runtime.models.head_checkpoint import target_identity
from runtime.models.hf import HFModel
from runtime.models.loader import load_model, load_tokenizer
from runtime.models.sampler import choose, logprobs
from runtime.models.step_timing import branch_row_time, knee, step_times
from runtime.models.vocab_check import vocabulary_size
from runtime.scheduler_factory import make_scheduler
from runtime.schedulers.living import MEASURED_ROWS
from runtime.target.engine import Engine
from runtime.target.head_runner import PRICED_BRANCH_ROWS, MountedHead
from runtime.target.stop_checker import StopChecker
from runtime.target.target import Target
from runtime.target.verifier import Verifier
from runtime.telemetry.tracing import NO_TRACE, TARGET, Trace

MEASURED_WIDTHS = (1, 2, 4, 8)  # candidate widths of a drafter's pass
DEFAULT_WIDTH = 4


def freeze_gc() -> None:
    """Exempts everything loaded so far from garbage collection, which would delay tokens."""
    gc.collect()
    gc.freeze()


def thread_count(placement: Placement) -> int | None:
    return placement.threads or len(placement.cores) or None


def eos_tokens(model: HFModel, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Returns the ids that end a text, from the tokenizer and the model's generation config."""
    settings = getattr(model.module, "generation_config", None)
    eos = getattr(settings, "eos_token_id", None)
    listed = eos if isinstance(eos, list) else [eos]
    return frozenset(
        token
        for token in (*listed, tokenizer.eos_token_id)
        if isinstance(token, int) and 0 <= token < model.vocabulary
    )


def stop_checker_factory(
    tokenizer: PreTrainedTokenizerFast, eos: frozenset[int]
) -> Callable[[Request], StopChecker]:
    def finish(request: Request) -> StopChecker:
        text = Detokenizer(tokenizer.backend_tokenizer, request.prompt)
        return StopChecker(request.sampling, eos, text.decode, text.flush)

    return finish


class BuiltTarget(NamedTuple):
    target: Target
    tokenizer: PreTrainedTokenizerFast
    times: dict[int, float]  # seconds of a pass, by its number of rows


def kv_slots(model: HFModel) -> int:
    """Returns how many tokens fit into a quarter of the free memory of the model's device."""
    return int(free_bytes(model.device) // 4 // model.slot_bytes)


def free_bytes(device: torch.device) -> int:
    """Returns the memory that is free on the device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def build_target(config: TargetConfig, record: bool = False) -> BuiltTarget:
    """Builds a target and measures its step times. With `record`, the engine records a trace."""
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, config.dtype, config.device, thread_count(config.placement))
    eos = eos_tokens(model, tokenizer)
    times = step_times(model, MEASURED_ROWS, time.monotonic)
    slots = config.kv_tokens or kv_slots(model)
    scheduler = make_scheduler(config.schedule, times)
    known = load_target_state(target_state_file(config), scheduler)
    trace = Trace(TARGET) if record else NO_TRACE
    heads = {
        name: mount_head(head, model, tokenizer) for name, head in config.named_heads().items()
    }
    engine = Engine(
        model,
        Verifier(choose, eos, logprobs),
        scheduler,
        time.monotonic,
        kv_slots=slots,
        calibrations=known,
        trace=trace,
        heads=heads,
    )
    grammars = GrammarCompiler(tokenizer, model.vocabulary, eos)
    target = Target(engine, stop_checker_factory(tokenizer, eos), grammars, grammars.close)
    return BuiltTarget(target, tokenizer, times)


def mount_head(
    config: HeadConfig, model: HFModel, tokenizer: PreTrainedTokenizerFast
) -> MountedHead:
    """Builds a head and measures what its pseudo rows cost."""
    head = build_head(config, model, tokenizer)
    priced = (
        branch_row_time(model, head.output_spec, PRICED_BRANCH_ROWS, time.monotonic)
        if head.output_spec.branches
        else 0.0
    )
    return MountedHead(head, priced)


def build_head(config: HeadConfig, model: HFModel, tokenizer: PreTrainedTokenizerFast) -> Head:
    """Builds a head.

    Raises ModelRefused if its weights were trained for another model, or the model does not support
    it.
    """
    method = importlib.import_module(f"runtime.heads.{module_name(config.method)}")
    head: Head = method.build(
        HeadContext(model, target_identity(model.module.config, tokenizer), head_folder(config))
    )
    model.check(head.output_spec)
    return head


def build_drafter(config: DrafterConfig, target: str, record: bool = False) -> DraftHost:
    """Builds a drafter and its host.

    `target` names the target's model: every drafter uses its vocabulary, and some methods load it
    too. With `record`, the engine records a trace.
    """

    def load(name: str) -> HFModel:
        return load_model(name, config.dtype, config.device, thread_count(config.placement))

    def load_layers(name: str) -> HFModel:
        return load_model(
            name, config.dtype, config.device, thread_count(config.placement), layers=config.layers
        )

    def load_changed(
        name: str, layers: Sequence[int], change: Callable[[PreTrainedModel], None]
    ) -> HFModel:
        return load_model(
            name,
            config.dtype,
            config.device,
            thread_count(config.placement),
            layers=layers,
            change=change,
        )

    method = importlib.import_module(f"runtime.drafters.{module_name(config.method)}")
    own = config.model if config.method not in TRAINED_METHODS else ""
    tokens, unknown = draft_vocabulary(load_tokenizer(own)) if own else (None, 0)
    drafter = method.build(
        DrafterContext(
            target,
            draft_model(config),
            load,
            load_layers,
            load_changed,
            config.dtype,
            config.device,
            thread_count(config.placement),
            tokens,
            unknown,
        )
    )
    known = load_calibrations(drafter_calibration_file(config, target))
    trace = Trace(config.name) if record else NO_TRACE
    return DraftHost(
        DraftEngine(
            drafter,
            config.name,
            config.width or draft_width(drafter),
            calibrations=known,
            trace=trace,
        )
    )


def draft_vocabulary(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """Returns the size of the vocabulary, and the id that stands for unknown tokens."""
    special = (tokenizer.unk_token_id, tokenizer.eos_token_id, 0)
    unknown = next(token for token in special if token is not None)
    return vocabulary_size(tokenizer), unknown


def draft_width(drafter: Drafter) -> int:
    """Returns how many leaves a drafter expands in one pass.

    That is the knee of its model's step time, or `DEFAULT_WIDTH` if the drafter has no model.
    """
    if isinstance(drafter, NoisyDrafter):
        return draft_width(drafter.inner)
    if isinstance(drafter, BlockDrafter):
        return max(MEASURED_WIDTHS)  # its light passes cost the same for any number of nodes
    if isinstance(drafter, EagleDrafter):
        return knee(guess_times(drafter.model, MEASURED_WIDTHS, time.monotonic))
    if not isinstance(drafter, ModelDrafter):
        return DEFAULT_WIDTH
    return knee(step_times(drafter.model, MEASURED_WIDTHS, time.monotonic))
