"""From a request's body to what targets are asked. Pure: names, seeds and time are handed in. (Back again: answers.py.)"""

import json
import re
from typing import Any

from actors.openai.chat_template import render
from actors.openai.errors import ApiError, sanitize
from actors.openai.protocol import AnyBody, ChatBody, CompletionBody, Message
from actors.openai.served_model import ServedModel
from runtime.core import limits
from runtime.core.messages import Request, Tokens
from runtime.core.sampling_params import Constraint, SamplingParams


def build_requests(
    body: AnyBody, served: ServedModel, name: str, seed: int, deadline: float | None = None
) -> list[Request]:
    """One for each choice: `n` of the first prompt, then of the second, ... Their sessions are called `name`-0, -1, ...

    Choice number i of a prompt is sampled with the body's seed + i; `seed` is for a body that has none. Raises InvalidRequest
    (ApiError, where OpenAI has a code for it).
    """
    if body.stream_options is not None and not body.stream:
        raise ApiError(
            400,
            "invalid_value",
            "stream_options without stream: leave them out, or set stream",
            "stream_options",
        )
    found: list[Request] = []
    for prompt in prompts(body, served):
        for choice in range(body.n):
            parameters = sampling(
                body, served, len(prompt), nth(seed if body.seed is None else body.seed, choice)
            )
            rows = body.speculative.max_rows
            found.append(
                Request(
                    session=f"{name}-{len(found)}",
                    prompt=prompt,
                    sampling=parameters,
                    speculation=body.speculative.enabled and rows != 0,
                    deadline=deadline,
                    max_rows=rows or None,
                )
            )
    return found


def prompts(body: AnyBody, served: ServedModel) -> list[Tokens]:
    if isinstance(body, ChatBody):
        text = render(served.tokenizer, [spoken(message) for message in body.messages])
        return [tuple(served.tokenizer.encode(text, add_special_tokens=False))]
    given = body.prompt
    several = isinstance(given, list) and not isinstance(given[0], int)
    return [tokens(prompt, served) for prompt in (given if several else [given])]


def tokens(prompt: Any, served: ServedModel) -> Tokens:
    """Of a text or a list of ids."""
    if isinstance(prompt, str):
        return tuple(served.tokenizer.encode(prompt))
    wrong = next((token for token in prompt if not 0 <= token < served.vocabulary), None)
    if wrong is not None:
        raise ApiError(
            400,
            "invalid_value",
            f"token id {sanitize(str(wrong))} is not in the vocabulary: give 0 to {served.vocabulary - 1}",
            "prompt",
        )
    return tuple(prompt)


def spoken(message: Message) -> dict[str, str]:
    """A message as templates know it. Raises ApiError for anything but text."""
    role = "system" if message.role == "developer" else message.role
    name = {} if message.name is None else {"name": message.name}
    if isinstance(message.content, str):
        return {"role": role, "content": message.content} | name
    for part in message.content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = sanitize(str(part.get("type")))
            raise ApiError(
                400,
                "unsupported_content",
                f"content of type {kind} is not supported: give text",
                "messages",
            )
    return {"role": role, "content": "\n".join(part["text"] for part in message.content)} | name


def nth(seed: int, choice: int) -> int:
    """seed + choice, as a 64-bit integer."""
    return (seed + choice + 2**63) % 2**64 - 2**63


def sampling(body: AnyBody, served: ServedModel, length: int, seed: int) -> SamplingParams:
    """For a prompt of so many tokens. Raises InvalidRequest."""
    given = body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        given = body.max_completion_tokens
    room = served.context - length
    if length == 0:
        raise ApiError(
            400,
            "invalid_value",
            "the prompt is empty: give at least one token",
            "messages" if isinstance(body, ChatBody) else "prompt",
        )
    if room < (given or 1):
        raise ApiError(
            400,
            "context_length_exceeded",
            f"the model's context is {served.context} tokens; the prompt has {length} and {given or 1} are asked for: lower one of them",
            "max_tokens" if room > 0 else "prompt",
        )
    return SamplingParams(
        temperature=body.temperature,
        top_k=max(body.top_k, 0),
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=tuple(
            (token_id(token, served), bias) for token, bias in body.logit_bias.items()
        ),
        seed=seed,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop),
        max_tokens=given or min(room, max(limits.DEFAULT_MAX_TOKENS, body.min_tokens)),
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        logprobs=logprobs(body),
        constraint=constraint(body),
    )


def token_id(token: str, served: ServedModel) -> int:
    """Of a key of logit_bias."""
    if not re.fullmatch(r"[0-9]{1,9}", token) or int(token) >= served.vocabulary:
        raise ApiError(
            400,
            "invalid_value",
            f"logit_bias token {sanitize(token)} is not in the vocabulary: give 0 to {served.vocabulary - 1}",
            "logit_bias",
        )
    return int(token)


def logprobs(body: AnyBody) -> int | None:
    """How many of the most likely tokens are wanted beside the chosen one; None: not even that."""
    if isinstance(body, CompletionBody):
        return body.logprobs
    if body.top_logprobs and not body.logprobs:
        raise ApiError(
            400, "invalid_value", "top_logprobs without logprobs: set logprobs", "top_logprobs"
        )
    return body.top_logprobs if body.logprobs else None


def constraint(body: AnyBody) -> Constraint | None:
    """What response_format or structured_outputs ask for. Raises InvalidRequest."""
    form, structured = body.response_format, body.structured_outputs
    found: list[Constraint] = []
    if form is not None and form.type == "json_object":
        found.append(Constraint("json_object"))
    if form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise ApiError(
                400,
                "missing_field",
                "response_format.json_schema is missing: give it",
                "response_format",
            )
        found.append(schema(form.json_schema.schema_))
    if form is not None and form.type == "regex":
        if form.regex is None:
            raise ApiError(
                400, "missing_field", "response_format.regex is missing: give it", "response_format"
            )
        found.append(Constraint("regex", form.regex))
    if structured is not None and structured.json_ is not None:
        found.append(schema(structured.json_))
    if structured is not None and structured.regex is not None:
        found.append(Constraint("regex", structured.regex))
    if len(found) > 1:
        raise ApiError(
            400,
            "invalid_value",
            "the output can have one form only: give one of response_format, json and regex",
            "response_format",
        )
    return found[0] if found else None


def schema(given: dict[str, Any] | str) -> Constraint:
    """Whether it means anything is the target's to say, before the first token."""
    return Constraint(
        "json_schema",
        given
        if isinstance(given, str)
        else json.dumps(given, ensure_ascii=False, separators=(",", ":")),
    )
