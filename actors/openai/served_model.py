"""Describes the model that a gateway serves: name, tokenizer and limits, but not its weights."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from runtime.config import Deployment
from runtime.models.hf import max_context
from runtime.models.loader import load_tokenizer, read_config
from runtime.models.model_folder import find_folder
from runtime.models.token_bytes import TokenBytes, token_bytes


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The served model.

    name            the name that clients ask for
    byte_tokenizer  maps each token to its bytes
    context         the model's maximum length, in tokens
    vocabulary      number of token ids
    created         seconds since 1970
    """

    name: str
    tokenizer: PreTrainedTokenizerFast
    byte_tokenizer: TokenBytes
    context: int
    vocabulary: int
    created: int


def load_served_model(plan: Deployment, created: int) -> ServedModel:
    """Reads the tokenizer and the configuration of the target's model. Raises ModelRefused."""
    model = plan.target.model
    text = read_config(find_folder(model), model).get_text_config(decoder=True)
    tokenizer = load_tokenizer(model)
    return ServedModel(
        plan.served_model(),
        tokenizer,
        token_bytes(tokenizer),
        max_context(text, model),
        text.vocab_size,
        created,
    )
