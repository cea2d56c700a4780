"""Defines the request bodies.

Types are strict: "5", true and 1.5 are not accepted as a number of tokens.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from actors.openai.errors import ApiError, sanitize
from runtime.core import limits

# Validation of a long list stops at its first error: each costs pydantic microseconds.
Ids = Annotated[list[int], Field(min_length=1, fail_fast=True)]
Finite = Annotated[float, Field(allow_inf_nan=False)]

# These are rejected even if unknown fields are ignored: a client that sends them needs their
# effect.
ALWAYS_REFUSED = frozenset(
    {
        "chat_template",
        "chat_template_kwargs",
        "logits_processors",
        "lora_path",
        "lora_request",
        "mm_processor_kwargs",
    }
)

MAX_UNKNOWN_FIELDS = 1000  # in all messages of a body

# Fields of OpenAI and vLLM that this server lacks, with the values that mean the same as leaving
# them out. Such a field is left out; with another value it is unknown, and refused by name.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "suffix": ("",),
    "verbosity": ("medium",),
    "reasoning_effort": ("none",),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "priority": (0,),
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "logits_processors": ([],),
}
NEUTRAL_CHAT_VALUES = NEUTRAL_VALUES | {
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "documents": ([],),
}
NEUTRAL_COMPLETION_VALUES = NEUTRAL_VALUES | {"add_special_tokens": (True,)}
NEUTRAL_MESSAGE_VALUES: dict[str, tuple[Any, ...]] = {
    "type": ("text", "message"),
    "annotations": ([],),
}
# In what clients define themselves, null is a value.
OPAQUE_FIELDS = frozenset({"schema", "json", "arguments"})

EXPECTED = {
    "prompt": f"a string, a list of token ids, or a list of up to {limits.PROMPTS} of either",
    "stop": f"a string, or a list of up to {limits.STOP_STRINGS}",
    "messages": "a list of objects with role (system, developer, user, assistant or tool)"
    " and content (text)",
}


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(StrictModel):
    """OpenAI's stream_options, and vLLM's `continuous_usage_stats`: usage so far in all events."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class Speculative(StrictModel):
    """Options of speculative decoding. `max_rows`: tree nodes that a step may verify for this
    request.
    """

    enabled: bool = True
    max_rows: int | None = Field(default=None, ge=0, le=limits.STEP_ROWS)


class JsonSchema(StrictModel):
    name: str = ""
    description: str = ""
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = True


class ResponseFormat(StrictModel):
    """OpenAI's response_format, extended by `regex`."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = None
    regex: str | None = None


class StructuredOutputs(StrictModel):
    """vLLM's structured_outputs."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None


class CommonBody(StrictModel):
    """The fields that completions and chat share.

    Names and meanings are OpenAI's, or vLLM's for fields that OpenAI lacks.
    """

    model: str
    n: int = Field(default=1, ge=1, le=limits.CHOICES)
    best_of: int | None = Field(default=None, ge=1, description="n, if given")
    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int = Field(default=0, ge=0)
    temperature: Finite = 1.0
    top_p: Finite = 1.0
    top_k: int = Field(default=0, ge=-1)
    min_p: Finite = 0.0
    presence_penalty: Finite = 0.0
    frequency_penalty: Finite = 0.0
    repetition_penalty: Finite = 1.0
    logit_bias: dict[str, Finite] = Field(default={}, max_length=limits.LOGIT_BIAS)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: str | Annotated[list[str], Field(max_length=limits.STOP_STRINGS)] = []
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    speculative: Speculative = Speculative()
    stream: bool = False
    stream_options: StreamOptions | None = None
    timeout: Annotated[Finite, Field(gt=0, le=limits.MAX_DEADLINE_S)] | None = Field(
        default=None, description="seconds until the deadline"
    )

    # These only matter to OpenAI's own service, and are ignored.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class CompletionBody(CommonBody):
    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1, max_length=limits.PROMPTS, fail_fast=True)]
        | Annotated[list[Ids], Field(min_length=1, max_length=limits.PROMPTS, fail_fast=True)]
        | Annotated[list[str | Ids], Field(min_length=1, max_length=limits.PROMPTS, fail_fast=True)]
    )
    max_tokens: int | None = Field(default=None, ge=0, description="0 only with echo")
    logprobs: int | None = Field(default=None, ge=0, le=limits.LOGPROBS)
    echo: bool = False

    def prompts(self) -> list[str] | list[list[int]] | list[str | list[int]]:
        """Returns the prompts; one that stands alone as a list of one."""
        given: Any = self.prompt
        alone = isinstance(given, str) or isinstance(given[0], int)
        return [given] if alone else given


class Message(StrictModel):
    """A chat message. `content` is text, or parts of type "text"; an assistant that calls tools
    needs none. request_adapter.py checks parts and calls.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(fail_fast=True)] = []
    tool_call_id: str | None = None


class ChatBody(CommonBody):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=limits.LOGPROBS)


AnyBody = CompletionBody | ChatBody
BODY_TYPES: dict[str, type[CompletionBody] | type[ChatBody]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
}


def parse_body(
    url: str, value: dict[str, Any], strict: bool = True
) -> tuple[AnyBody, tuple[str, ...]]:
    """Returns the body of a request to `url` (a key of BODY_TYPES), and its unknown fields.

    With `strict`, an unknown field is an error. A field that is null or asks for nothing counts as
    absent. Raises ApiError (400).
    """
    kind = BODY_TYPES[url]
    value = drop_neutral(drop_nulls(value), kind)
    check_unknown(value)
    try:
        return kind.model_validate(value), ()
    except ValidationError as error:
        errors = error.errors(include_input=False, include_url=False, include_context=False)
    unknown = [found["loc"] for found in errors if found["type"] == "extra_forbidden"]
    if unknown and (strict or any(loc[0] in ALWAYS_REFUSED for loc in unknown)):
        raise ApiError(
            400,
            "unknown_field",
            f"unknown field {sanitize(dotted(unknown[0]))}: leave it out",
            sanitize(dotted(unknown[0])),
        )
    if len(unknown) < len(errors):
        raise validation_error(
            next(
                (found["loc"], found["msg"], found["type"])
                for found in errors
                if found["type"] != "extra_forbidden"
            )
        )
    value = copy.deepcopy(value)
    for loc in unknown:
        delete_at(value, loc)
    return kind.model_validate(value), tuple(sanitize(dotted(loc)) for loc in unknown)


def validation_error(first: tuple[tuple[int | str, ...], str, str]) -> ApiError:
    loc, why, kind = first
    field = str(loc[0]) if loc else ""
    if kind == "missing":
        return ApiError(
            400,
            "missing_field",
            f"{sanitize(dotted(loc))} is missing: give it",
            sanitize(dotted(loc)),
        )
    if field in EXPECTED:
        return ApiError(
            400, "invalid_value", f"{field} is not allowed: give {EXPECTED[field]}", field
        )
    name = sanitize(dotted(loc))
    return ApiError(
        400, "invalid_value", f"{name} is not allowed: {why[:1].lower()}{why[1:]}", sanitize(field)
    )


def check_unknown(value: dict[str, Any]) -> None:
    """Raises ApiError if the messages have too many unknown fields to report each."""
    messages = value.get("messages")
    if isinstance(messages, list):
        known = Message.model_fields.keys()
        if (
            sum(len(message.keys() - known) for message in messages if isinstance(message, dict))
            > MAX_UNKNOWN_FIELDS
        ):
            why = f"messages have more than {MAX_UNKNOWN_FIELDS} unknown fields: leave them out"
            raise ApiError(400, "too_complex", why, "messages")


def drop_nulls(value: dict[str, Any]) -> dict[str, Any]:
    """Returns the object without members that are null, at any depth."""
    return {
        name: field if name in OPAQUE_FIELDS else drop_inner_nulls(field)
        for name, field in value.items()
        if field is not None
    }


def drop_inner_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return drop_nulls(value)
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return [drop_inner_nulls(item) for item in value]
    return value


def drop_neutral(value: dict[str, Any], kind: type[BaseModel]) -> dict[str, Any]:
    """Returns the body without fields that ask for nothing."""
    chat = kind is ChatBody
    found = without_values(value, NEUTRAL_CHAT_VALUES if chat else NEUTRAL_COMPLETION_VALUES)
    messages = found.get("messages")
    if isinstance(messages, list):
        found["messages"] = [
            without_values(message, NEUTRAL_MESSAGE_VALUES)
            if isinstance(message, dict)
            else message
            for message in messages
        ]
    return found


def without_values(value: dict[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Returns the object without the members that have one of the values given for their name."""
    return {
        name: field
        for name, field in value.items()
        if not any(
            field == same and isinstance(field, bool) == isinstance(same, bool)
            for same in neutral.get(name, ())
        )
    }


def delete_at(value: Any, loc: Sequence[int | str]) -> None:
    """Deletes the field at `loc`, the location of a validation error.

    No union contains an object, so `loc` is the path to the field.
    """
    *path, last = loc
    for step in path:
        value = value[step]
    del value[last]


def dotted(loc: Sequence[int | str]) -> str:
    return ".".join(map(str, loc))
