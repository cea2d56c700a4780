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

from actors.openai.errors import Refused, plain

RENDER_SECONDS = 1.0
TEMPLATE_CHARACTERS = 256 << 10
TEXT_CHARACTERS = 8 << 20  # twice what a body may hold
TEMPLATE = "<template>"  # what Jinja calls the file of compiled templates

Message = dict[str, str]


class RenderingTooSlow(Exception):
    """The template runs on and on."""


def render(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> str:
    """The prompt, up to where the assistant is to speak, in transformers' sandbox. Raises Refused (400)."""
    if tokenizer.chat_template is None:
        raise Refused(
            400,
            "no_chat_template",
            "the model has no chat template: use /v1/completions",
            "messages",
        )
    try:
        check(tokenizer.get_chat_template())
        with interrupted(RENDER_SECONDS, time.monotonic):
            text: Any = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
    except RenderingTooSlow as error:
        raise misfit(f"it takes more than {RENDER_SECONDS:g} s") from error
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
        raise misfit(plain(str(error))) from error
    if not isinstance(text, str) or len(text) > TEXT_CHARACTERS:
        raise misfit("it writes too much")
    return text


@lru_cache
def check(template: str) -> None:
    """Raises Refused for a template that could hold up everything at once: a power is computed in one piece, by the compiler even."""
    if len(template) > TEMPLATE_CHARACTERS:
        raise misfit(f"it has {len(template)} characters")
    if any(
        (kind, value) == ("operator", "**") for _, kind, value in jinja2.Environment().lex(template)
    ):
        raise misfit("it computes powers")


def misfit(why: str) -> Refused:
    return Refused(
        400,
        "chat_template_error",
        f"the model's chat template does not take these messages: {why}",
        "messages",
    )


@contextmanager
def interrupted(seconds: float, now: Callable[[], float]) -> Iterator[None]:
    """Ends a template's code on this thread with RenderingTooSlow when the time is over: at the next line that it enters."""
    until = now() + seconds
    before = sys.gettrace()

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        if now() > until:
            raise RenderingTooSlow
        return line

    def call(frame: FrameType, event: str, argument: Any) -> Any:
        return line if frame.f_code.co_filename == TEMPLATE else None

    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)
