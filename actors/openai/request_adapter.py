"""Converts a request's body into requests to targets. Pure: callers pass names, seeds and times.

The way back is in response_builder.py.
"""

import json
import re
from collections.abc import Collection
from typing import Any

from actors.openai.chat_template import render, template_words
from actors.openai.errors import ApiError, sanitize
from actors.openai.protocol import AnyBody, ChatBody, CompletionBody, Message, StreamOptions
from actors.openai.served_model import ServedModel
from runtime.config import LimitsConfig
from runtime.core import limits
from runtime.core.messages import Request, Tokens
from runtime.core.sampling_params import Constraint, SamplingParams

DEFAULT_LIMITS = LimitsConfig()


def build_requests(
    body: AnyBody,
    served: ServedModel,
    name: str,
    seed: int,
    deadline: float | None = None,
    bounds: LimitsConfig = DEFAULT_LIMITS,
) -> list[Request]:
    """Returns a request for each choice: `n` for the first prompt, `n` for the second, and so on.

    Their sessions are called `name`-0, `name`-1, ... Choice i of a prompt is sampled with the
    body's seed + i, or with `seed` + i if the body has none. Raises InvalidRequest; ApiError if
    OpenAI has a code for the error, or one of `bounds` is exceeded.
    """
    if body.best_of not in (None, body.n):
        raise ApiError(
            400,
            "invalid_value",
            f"best_of {sanitize(str(body.best_of))} is not supported: leave it out, or give n",
            "best_of",
        )
    if body.stream_options not in (None, StreamOptions()) and not body.stream:
        raise ApiError(
            400,
            "invalid_value",
            "stream_options without stream: leave them out, or set stream",
            "stream_options",
        )
    echo = isinstance(body, CompletionBody) and body.echo
    if body.max_tokens == 0 and not echo:
        raise ApiError(
            400,
            "invalid_value",
            "max_tokens 0 is not allowed: give at least 1, or set echo",
            "max_tokens",
        )
    found: list[Request] = []
    for prompt in tokenize_prompts(body, served, bounds):
        for choice in range(body.n):
            parameters = sampling_params(
                body,
                served,
                len(prompt),
                choice_seed(seed if body.seed is None else body.seed, choice),
            )
            rows = body.speculative.max_rows if parameters.max_tokens else 0  # nothing to guess
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


def tokenize_prompts(body: AnyBody, served: ServedModel, bounds: LimitsConfig) -> list[Tokens]:
    """Returns the token ids of each prompt. Raises ApiError if a limit of the configuration is
    exceeded.
    """
    if body.n > bounds.choices:
        raise over_limit("n", body.n, "choices", bounds.choices)
    if isinstance(body, ChatBody):
        known = template_words(served.tokenizer)
        messages = [
            template_message(message, index, known) for index, message in enumerate(body.messages)
        ]
        text = render(served.tokenizer, messages)
        return [tuple(served.tokenizer.encode(text, add_special_tokens=False))]
    prompts = body.prompts()
    if len(prompts) > bounds.prompts:
        raise over_limit("prompt", len(prompts), "prompts", bounds.prompts)
    ids = sum(len(prompt) for prompt in prompts if not isinstance(prompt, str))
    if ids > bounds.prompt_ids:
        raise over_limit("prompt", ids, "prompt_ids", bounds.prompt_ids)
    found = [tokenize(prompt, served) for prompt in prompts]
    if body.echo and body.logprobs is not None:
        values = sum(map(len, found)) * body.n * (1 + body.logprobs)
        if values > bounds.prompt_logprobs:
            raise over_limit("logprobs", values, "prompt_logprobs", bounds.prompt_logprobs)
    return found


def over_limit(param: str, given: int, limit: str, most: int) -> ApiError:
    what = {
        "choices": f"n {given} is",
        "prompts": f"{given} prompts are",
        "prompt_ids": f"{given} token ids of prompts are",
        "prompt_logprobs": f"{given} log-probabilities of prompts are",
    }[limit]
    return ApiError(
        400,
        "invalid_value",
        f"{what} over limits.{limit} of this server, {most}: ask for fewer at a time",
        param,
    )


def tokenize(prompt: Any, served: ServedModel) -> Tokens:
    """Returns the token ids of a text, or check a list of ids."""
    if isinstance(prompt, str):
        return tuple(served.tokenizer.encode(prompt))
    wrong = next((token for token in prompt if not 0 <= token < served.vocabulary), None)
    if wrong is not None:
        raise ApiError(
            400,
            "invalid_value",
            f"token id {sanitize(str(wrong))} is not in the vocabulary:"
            f" give 0 to {served.vocabulary - 1}",
            "prompt",
        )
    return tuple(prompt)


def template_message(message: Message, index: int, known: Collection[str]) -> dict[str, Any]:
    """Returns message `index` in the form that templates expect. Raises ApiError if it is not text.

    `known` are the words of the template. A developer that it does not name is a system to it;
    tools that it does not name are refused.
    """
    role = message.role
    if role == "developer" and role not in known:
        role = "system"
    if role == "tool" and role not in known:
        raise unknown_to_template(f"messages.{index}: role tool")
    found: dict[str, Any] = {"role": role, "content": message_text(message, index)}
    if message.name is not None:
        found["name"] = message.name
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        if "tool_calls" not in known:
            raise unknown_to_template(f"messages.{index}.tool_calls")
        found["tool_calls"] = [template_call(call, index) for call in message.tool_calls]
    return found


def unknown_to_template(what: str) -> ApiError:
    return ApiError(
        400,
        "invalid_value",
        f"{what} is not supported: the model's chat template does not know it",
        "messages",
    )


def message_text(message: Message, index: int) -> str:
    """Returns the content as one text. Raises ApiError if it is missing, or is not text."""
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        if message.role == "assistant" and message.tool_calls:
            return ""
        name = f"messages.{index}.content"
        raise ApiError(400, "missing_field", f"{name} is missing: give it", name)
    for part in message.content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = sanitize(str(part.get("type")))
            raise ApiError(
                400,
                "unsupported_content",
                f"content of type {kind} is not supported: give text",
                "messages",
            )
    return "\n".join(part["text"] for part in message.content)


def template_call(call: dict[str, Any], index: int) -> dict[str, Any]:
    """Returns a call of a tool, its arguments as an object: templates write them as JSON."""
    function = call.get("function")
    name, given = (
        (function.get("name"), function.get("arguments", {}))
        if isinstance(function, dict)
        else (None, None)
    )
    try:
        arguments = json.loads(given or "{}") if isinstance(given, str) else given
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ApiError(
            400,
            "invalid_value",
            f"messages.{index}.tool_calls is not allowed: give calls of functions, each with a name"
            " and a JSON object of arguments",
            "messages",
        )
    return {
        "id": str(call.get("id", "")),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def choice_seed(seed: int, choice: int) -> int:
    """Returns seed + choice as a signed 64-bit integer."""
    return (seed + choice + 2**63) % 2**64 - 2**63


def sampling_params(body: AnyBody, served: ServedModel, length: int, seed: int) -> SamplingParams:
    """Returns the sampling parameters for a prompt of `length` tokens. Raises InvalidRequest."""
    given = body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        given = body.max_completion_tokens
    room, least = served.context - length, 1 if given is None else given
    if length == 0:
        raise ApiError(
            400,
            "invalid_value",
            "the prompt is empty: give at least one token",
            "messages" if isinstance(body, ChatBody) else "prompt",
        )
    if room < least:
        raise ApiError(
            400,
            "context_length_exceeded",
            f"the model's context is {served.context} tokens; the prompt has {length} and"
            f" {least} are asked for: lower one of them",
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
            (parse_token_id(token, served), bias) for token, bias in body.logit_bias.items()
        ),
        seed=seed,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop),
        max_tokens=min(room, max(limits.DEFAULT_MAX_TOKENS, body.min_tokens))
        if given is None
        else given,
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        logprobs=logprob_count(body),
        constraint=parse_constraint(body),
        prompt_logprobs=prompt_logprob_count(body),
    )


def parse_token_id(token: str, served: ServedModel) -> int:
    """Returns the token id that a key of logit_bias names."""
    if not re.fullmatch(r"[0-9]{1,9}", token) or int(token) >= served.vocabulary:
        raise ApiError(
            400,
            "invalid_value",
            f"logit_bias token {sanitize(token)} is not in the vocabulary:"
            f" give 0 to {served.vocabulary - 1}",
            "logit_bias",
        )
    return int(token)


def logprob_count(body: AnyBody) -> int | None:
    """Returns how many top tokens to report with the chosen one; None for no logprobs at all."""
    if isinstance(body, CompletionBody):
        return body.logprobs
    if body.top_logprobs and not body.logprobs:
        raise ApiError(
            400, "invalid_value", "top_logprobs without logprobs: set logprobs", "top_logprobs"
        )
    return body.top_logprobs if body.logprobs else None


def prompt_logprob_count(body: AnyBody) -> int | None:
    """Returns how many top tokens to report with each token of the prompt; None for no logprobs.

    A request that only has its prompt read asks for some in any case.
    """
    if not isinstance(body, CompletionBody) or not body.echo:
        return None
    return 0 if body.logprobs is None and body.max_tokens == 0 else body.logprobs


def parse_constraint(body: AnyBody) -> Constraint | None:
    """Returns the constraint of response_format or structured_outputs. Raises InvalidRequest."""
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
        found.append(schema_constraint(form.json_schema.schema_))
    if form is not None and form.type == "regex":
        if form.regex is None:
            raise ApiError(
                400, "missing_field", "response_format.regex is missing: give it", "response_format"
            )
        found.append(Constraint("regex", form.regex))
    if structured is not None and structured.json_ is not None:
        found.append(schema_constraint(structured.json_))
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


def schema_constraint(given: dict[str, Any] | str) -> Constraint:
    """Returns the constraint of a JSON schema. The target validates it before the first token."""
    return Constraint(
        "json_schema",
        given
        if isinstance(given, str)
        else json.dumps(given, ensure_ascii=False, separators=(",", ":")),
    )
