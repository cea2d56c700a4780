"""Held-out prompts from JSON Lines, such as Spec-Bench's and MT-Bench's."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from runtime.core.errors import InvalidRequest
from runtime.core.messages import Tokens
from training.conversations import encode
from training.text import read_file


def read_prompts(path: Path) -> list[str]:
    """Return the prompt of each line: its "prompt", or the first of its "turns".

    Raises InvalidRequest for a file or a line without.
    """
    lines = read_file(path, path.name).text.splitlines()
    found = [prompt_of(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line]
    if not found:
        raise InvalidRequest(f"{path} has no prompts: give JSON Lines", "held_out")
    return found


def prompt_of(line: str, place: str) -> str:
    try:
        value: Any = json.loads(line)
    except ValueError:
        value = None
    turns = [value.get("prompt"), *(value.get("turns") or [])] if isinstance(value, dict) else []
    prompts = [turn for turn in turns if isinstance(turn, str) and turn]
    if not prompts:
        raise InvalidRequest(
            f'{place} has no prompt: give JSON Lines with "prompt" or "turns"', "held_out"
        )
    return prompts[0]


def spread(prompts: list[str], count: int) -> list[str]:
    """Return up to `count` prompts, evenly spaced."""
    count = min(count, len(prompts))
    return [prompts[index * len(prompts) // count] for index in range(count)]


def as_tokens(tokenizer: PreTrainedTokenizerFast, prompt: str) -> Tokens:
    """Return the prompt as a user's turn of the chat template, or as it is without one."""
    if tokenizer.chat_template is None:
        return encode(tokenizer, prompt)
    text: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return encode(tokenizer, text)
