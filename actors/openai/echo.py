"""Prepares the prompts that a completion echoes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from tokenizers import Tokenizer

from actors.openai.protocol import AnyBody, CompletionBody
from actors.openai.served_model import ServedModel
from runtime.core.messages import Request, Tokens
from runtime.models.detokenize import TextOffsets


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as the response shows it. `offsets` (tokens,) are those in `text`; empty if the
    response has no logprobs.
    """

    text: str
    tokens: Tokens
    offsets: tuple[int, ...]


def build_echoes(body: AnyBody, served: ServedModel, requests: Sequence[Request]) -> list[Echo]:
    """Returns the prompt of each request, or an empty list if the body does not ask for them."""
    if not isinstance(body, CompletionBody) or not body.echo:
        return []
    tokenizer: Tokenizer = served.tokenizer.backend_tokenizer
    prompts, found = body.prompts(), list[Echo]()
    for prompt, request in zip(prompts, requests[:: body.n], strict=True):
        text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
        offsets = (
            prompt_offsets(tokenizer, prompt, request.prompt) if body.logprobs is not None else ()
        )
        found += [Echo(text, request.prompt, tuple(offsets))] * body.n
    return found


def prompt_offsets(tokenizer: Tokenizer, prompt: str | list[int], tokens: Tokens) -> list[int]:
    """Returns the characters before the text of each token of a prompt: of a text, in that text;
    of token ids, in what they are decoded to.
    """
    if isinstance(prompt, str):
        encoded = tokenizer.encode(prompt)
        if len(encoded.ids) == len(tokens):
            return [*accumulate((start for start, _ in encoded.offsets), max)]
    return [*map(TextOffsets(tokenizer, ()).next, tokens)]
