"""Renders a conversation with the model's chat template, within limits.

A template comes from the model's author and is not trusted: its run time and its output are
bounded.
"""

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

RENDER_TIMEOUT_S = 1.0  # of the processor, so that a busy machine refuses nothing
MAX_TEMPLATE_CHARACTERS = 256 << 10
MAX_TEXT_CHARACTERS = 8 << 20  # twice the limit of a body
COMPILED_TEMPLATE_NAME = "<template>"  # Jinja's file name for compiled templates

Message = dict[str, Any]


class RenderTimeout(Exception):
    """The template runs for too long."""


def render(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> str:
    """Returns the prompt up to the assistant's turn, rendered in transformers' sandbox.

    Raises ApiError (400).
    """
    if tokenizer.chat_template is None:
        raise ApiError(
            400,
            "no_chat_template",
            "the model has no chat template: use /v1/completions",
            "messages",
        )
    try:
        check_template(tokenizer.get_chat_template())
        with time_limit(RENDER_TIMEOUT_S, time.thread_time):
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
        raise template_error(f"its output has more than {MAX_TEXT_CHARACTERS} characters")
    return text


@lru_cache
def check_template(template: str) -> None:
    """Raises ApiError for a template that could block the whole process.

    A power is evaluated in one step, even by the compiler, so no time limit can interrupt it.
    """
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise template_error(
            f"it has {len(template)} characters, more than {MAX_TEMPLATE_CHARACTERS}"
        )
    if any(
        (kind, value) == ("operator", "**") for _, kind, value in jinja2.Environment().lex(template)
    ):
        raise template_error("it computes powers")


def template_words(tokenizer: PreTrainedTokenizerFast) -> frozenset[str]:
    """Returns the names and strings in the code of the chat template: roles and fields that the
    template does not name, it does not know.
    """
    if tokenizer.chat_template is None:
        return frozenset()
    return words_of(tokenizer.get_chat_template())


@lru_cache
def words_of(template: str) -> frozenset[str]:
    check_template(template)
    try:
        return frozenset(
            value.strip("'\"")
            for _, kind, value in jinja2.Environment().lex(template)
            if kind in ("name", "string")
        )
    except jinja2.TemplateError as error:
        raise template_error(sanitize(str(error))) from error


def template_error(why: str) -> ApiError:
    return ApiError(
        400,
        "chat_template_error",
        f"the model's chat template does not take these messages: {why}",
        "messages",
    )


@contextmanager
def time_limit(seconds: float, now: Callable[[], float]) -> Iterator[None]:
    """Raises RenderTimeout in template code on this thread, at its first new line after
    the limit.
    """
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
