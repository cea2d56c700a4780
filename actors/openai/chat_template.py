"""A conversation as the model's own text. Its template comes from a stranger: it is bounded in time and in what it writes."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerFast

from actors.openai.errors import ApiError, sanitize

RENDER_TIMEOUT_S = 1.0
MAX_TEMPLATE_CHARACTERS = 256 << 10
MAX_TEXT_CHARACTERS = 8 << 20  # twice what a body may hold
COMPILED_TEMPLATE_NAME = "<template>"  # what Jinja calls the file of compiled templates

Message = dict[str, str]


class RenderTimeout(Exception):
    """The template runs on and on."""


def render(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> str:
    """The prompt, up to where the assistant is to speak, in transformers' sandbox. Raises ApiError (400)."""
    if tokenizer.chat_template is None:
        raise ApiError(
            400,
            "no_chat_template",
            "the model has no chat template: use /v1/completions",
            "messages",
        )
    try:
        check_template(tokenizer.get_chat_template())
        with time_limit(RENDER_TIMEOUT_S, time.monotonic):
            text: Any = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
    except RenderTimeout as error:
        raise template_error(f"it takes more than {RENDER_TIMEOUT_S:g} s") from error
    except (
        jinja2.TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise template_error(sanitize(str(error))) from error
    if not isinstance(text, str) or len(text) > MAX_TEXT_CHARACTERS:
        raise template_error("it writes too much")
    return text


@lru_cache
def check_template(template: str) -> None:
    """Raises ApiError for a template that could hold up everything at once: a power is computed in one piece, by the compiler even."""
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise template_error(f"it has {len(template)} characters")
    if any(
        (kind, value) == ("operator", "**") for _, kind, value in jinja2.Environment().lex(template)
    ):
        raise template_error("it computes powers")


def template_error(why: str) -> ApiError:
    return ApiError(
        400,
        "chat_template_error",
        f"the model's chat template does not take these messages: {why}",
        "messages",
    )


@contextmanager
def time_limit(seconds: float, now: Callable[[], float]) -> Iterator[None]:
    """Ends a template's code on this thread with RenderTimeout when the time is over: at the next line that it enters."""
    until = now() + seconds
    before = sys.gettrace()

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        if now() > until:
            raise RenderTimeout
        return line

    def call(frame: FrameType, event: str, argument: Any) -> Any:
        return line if frame.f_code.co_filename == COMPILED_TEMPLATE_NAME else None

    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)
