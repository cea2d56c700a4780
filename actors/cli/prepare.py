"""What can be checked before anything is started: folders, tokenizers, lengths."""

from dataclasses import dataclass

from runtime.config import Deployment
from runtime.messages import Request, Tokens
from runtime.models.hf import context_of
from runtime.models.load import check_weights, find_folder, load_tokenizer, read_config
from runtime.models.pair import check_pair
from runtime.sampling import Sampling
from runtime.target import check


@dataclass(frozen=True, slots=True)
class Prepared:
    prompt: Tokens
    warnings: tuple[str, ...]


def prepare(plan: Deployment, text: str, sampling: Sampling) -> Prepared:
    """Tokenise, and raise now what the target or a drafter would raise later: ModelRefused, PairMismatch, InvalidRequest."""
    target = plan.target.model
    context, tokenizer = context_length(target), load_tokenizer(target)
    warnings: list[str] = []
    for draft in dict.fromkeys(drafter.model for drafter in plan.drafters if drafter.model):
        warnings += check_pair(tokenizer, load_tokenizer(draft), (target, draft), (context, context_length(draft)))
    prompt = tuple(tokenizer.encode(text))
    check(Request("", prompt, sampling), len(tokenizer), context)
    return Prepared(prompt, tuple(warnings))


def context_length(model: str) -> int:
    """Of a model whose folder is in order; its weights are looked at, not read."""
    folder = find_folder(model)
    config = read_config(folder, model)
    check_weights(folder, model)
    return context_of(config.get_text_config(decoder=True), model)
