"""Validates models, prompts and lengths before anything is started."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from runtime.config import TRAINED_METHODS, Deployment
from runtime.core.messages import Tokens
from runtime.core.sampling_params import SamplingParams
from runtime.model_paths import draft_model, head_folder
from runtime.models.head_checkpoint import find_checkpoint, target_identity
from runtime.models.hf import max_context
from runtime.models.loader import (
    check_loadable,
    check_weights,
    find_device,
    load_tokenizer,
    read_config,
)
from runtime.models.model_folder import find_folder
from runtime.models.vocab_check import check_pair
from runtime.target.target import check_prompt


@dataclass(frozen=True, slots=True)
class CheckedModels:
    """The target's tokenizer and context length in tokens, and warnings about the pairs."""

    tokenizer: PreTrainedTokenizerFast
    context: int
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    prompt: Tokens
    warnings: tuple[str, ...]


def check_models(plan: Deployment, local: bool = True) -> CheckedModels:
    """Validates the target, its heads and its drafters; if they run here (`local`), devices too.

    Raises ModelRefused, PairMismatch and InvalidRequest, as loading the models would.
    """
    if local:
        for device in dict.fromkeys([plan.target.device, *(pool.device for pool in plan.pools)]):
            find_device(device)
    target = plan.target.model
    context, tokenizer = context_length(target), load_tokenizer(target)
    trained = [
        (head.method, str(folder)) for head in plan.target.heads if (folder := head_folder(head))
    ]
    trained += [
        (pool.method, draft_model(pool)) for pool in plan.pools if pool.method in TRAINED_METHODS
    ]
    for method, place in trained:
        find_checkpoint(
            place,
            method.removesuffix("-head"),
            target_identity(read_config(find_folder(target), target), tokenizer),
        )
    warnings: list[str] = []
    for draft in dict.fromkeys(
        pool.model for pool in plan.pools if pool.model and pool.method not in TRAINED_METHODS
    ):
        warnings += check_pair(
            tokenizer, load_tokenizer(draft), (target, draft), (context, context_length(draft))
        )
    return CheckedModels(tokenizer, context, tuple(warnings))


def prepare(
    plan: Deployment, text: str, sampling: SamplingParams, local: bool = True
) -> PreparedPrompt:
    """Tokenizes the prompt.

    Raises as `check_models` does, and InvalidRequest as the target would.
    """
    found = check_models(plan, local)
    prompt = tuple(found.tokenizer.encode(text))
    check_prompt(prompt, sampling, len(found.tokenizer), found.context)
    return PreparedPrompt(prompt, found.warnings)


def context_length(model: str) -> int:
    """Returns a model's context length in tokens; checks its files without reading the weights.

    Raises ModelRefused, also if weights are missing or have other shapes.
    """
    folder = find_folder(model)
    config = read_config(folder, model)
    check_weights(folder, model)
    context = max_context(config.get_text_config(decoder=True), model)
    check_loadable(folder, model, config)
    return context
