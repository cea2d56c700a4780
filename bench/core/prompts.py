"""The benchmark's prompts: held-out files of the standard library, or a user's file. None was
selected for its results."""

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from runtime.core.errors import InvalidRequest
from runtime.core.messages import Tokens
from training import stdlib_corpus

CHAT_PROMPTS = Path(__file__).parents[1] / "chat_prompts.jsonl"  # questions for a chat model
MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS = 64, 256  # of a held-out prompt
PROMPT_FIELDS = (
    "prompt",
    "question",
    "turns",
    "text",
)  # in HumanEval, GSM8K, MT-Bench and Spec-Bench, plain text
MAX_FILE_BYTES = 1 << 26  # of a prompt file
MT_BENCH = "mt-bench"
MT_BENCH_CATEGORIES = frozenset(
    ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt; `name` gives its origin (category or file, then the line) and is the same in every
    run."""

    name: str
    tokens: Tokens

    @property
    def category(self) -> str:
        return category(self.name)


def category(name: str) -> str:
    """Return the category or file in a prompt's name; "" if there is none."""
    return name.rpartition(":")[0]


def held_out_prompts(tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> list[Prompt]:
    """Draw excerpts of whole lines from `count` different held-out files.

    An excerpt has MIN_PROMPT_TOKENS to MAX_PROMPT_TOKENS tokens. Files, positions and lengths
    depend only on `seed`. Raises InvalidRequest if there are fewer files than `count`.
    """
    draw = random.Random(seed)
    names = stdlib_corpus.library_files(held_out=True)
    draw.shuffle(names)
    found: list[Prompt] = []
    for name in names:
        if len(found) == count:
            break
        cut = excerpt(tokenizer, stdlib_corpus.read_source(name), draw)
        if cut is not None:
            line, tokens = cut
            found.append(Prompt(f"{name}:{line}", tokens))
    if len(found) < count:
        raise InvalidRequest(
            f"{count} prompts are more than the {len(found)} held-out files provide: ask for fewer",
            "count",
        )
    return found


def excerpt(
    tokenizer: PreTrainedTokenizerFast, text: str, draw: random.Random
) -> tuple[int, Tokens] | None:
    """Return whole lines from a random line on, up to a random number of tokens, with the line
    number.

    Return None if the text is too short.
    """
    lines = text.splitlines(keepends=True)
    most = draw.randint(MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS)
    first = draw.randrange(max(1, len(lines)))
    tokens: Tokens = ()
    for last in range(first + 1, len(lines) + 1):
        longer = tuple(tokenizer.encode("".join(lines[first:last])))
        if len(longer) > most:
            break
        tokens = longer
    return (first + 1, tokens) if len(tokens) >= MIN_PROMPT_TOKENS else None


def read_prompts(path: Path) -> dict[str, str]:
    """Return texts by name, in the order of the file.

    - .jsonl: one object per line, named by its `category` if it has one, with the prompt under
      `prompt`, `question`, `turns` (a list; its first entry) or `text`; or one string per line;
    - .json: a list of such objects or strings;
    - a folder: each file is a prompt;
    - any other file: each non-blank line is a prompt.

    Raises InvalidRequest that names file and line.
    """
    if path.is_dir():
        files = sorted(
            file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")
        )
        return drop_empty({file.name: read_text(file) for file in files}, path)
    text = read_text(path)
    if path.suffix == ".json":
        values = parse_json(text, str(path))
        if not isinstance(values, list):
            raise InvalidRequest(f"{path} is not a JSON list: give a list of prompts", "prompts")
        return drop_empty(
            {
                f"{path.name}:{number}": prompt_of(value, f"{path}, entry {number}")
                for number, value in enumerate(values, 1)
            },
            path,
        )
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix == ".jsonl":
        values = {n: parse_json(line, f"{path}, line {n}") for n, line in lines}
        return drop_empty(
            {
                f"{category_of(value) or path.name}:{n}": prompt_of(value, f"{path}, line {n}")
                for n, value in values.items()
            },
            path,
        )
    return drop_empty({f"{path.name}:{number}": line for number, line in lines}, path)


def read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidRequest(
                f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB: give a smaller prompt file",
                "prompts",
            )
        return path.read_text("utf-8")
    except OSError as error:
        raise InvalidRequest(
            f"{path} cannot be read ({error.strerror}): give a prompt file", "prompts"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{path} is not UTF-8 text: give a prompt file in UTF-8", "prompts"
        ) from error


def parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"{where} is invalid JSON ({str(error).splitlines()[0]}): fix it", "prompts"
        ) from error


def category_of(value: object) -> str:
    """Return the category that the prompt's object names, or ""; MT-bench's eight are one."""
    found = value.get("category") if isinstance(value, dict) else None
    if not isinstance(found, str):
        return ""
    return MT_BENCH if found in MT_BENCH_CATEGORIES else found


def prompt_of(value: object, where: str) -> str:
    if isinstance(value, dict):
        field = next((field for field in PROMPT_FIELDS if field in value), None)
        if field is None:
            raise InvalidRequest(
                f"{where} has no prompt: add the field {', '.join(PROMPT_FIELDS[:-1])} or "
                f"{PROMPT_FIELDS[-1]}",
                "prompts",
            )
        value, where = value[field], f"{where}, {field}"
        if isinstance(value, list) and value:
            value = value[0]
    if not isinstance(value, str) or not value:
        raise InvalidRequest(
            f"{where} is not a non-empty string ({type(value).__name__}): give a text",
            "prompts",
        )
    return value


def drop_empty(texts: dict[str, str], path: Path) -> dict[str, str]:
    full = {name: text for name, text in texts.items() if text}
    if not full:
        raise InvalidRequest(f"{path} holds no prompt: give a file with prompts", "prompts")
    return full


def encode_prompts(
    tokenizer: PreTrainedTokenizerFast, texts: dict[str, str], most: int
) -> list[Prompt]:
    """Tokenize the texts, as a user's message if the tokenizer has a chat template.

    A text longer than `most` tokens keeps its end, which the output continues.
    """
    return [
        Prompt(name, tuple(encode_prompt(tokenizer, text))[-most:]) for name, text in texts.items()
    ]


def encode_prompt(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    if tokenizer.chat_template is None:
        return list(tokenizer.encode(text))
    messages = [{"role": "user", "content": text}]
    found = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return [int(token) for token in found]


def sample_prompts(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """Draw `count` prompts by `seed`, as many of each category as there are, in turns.

    Every beginning of the result holds the categories in equal parts, so it can be divided. All
    prompts are returned if there are fewer.
    """
    draw, groups = random.Random(seed), defaultdict[str, list[Prompt]](list)
    for prompt in draw.sample(list(prompts), len(prompts)):
        groups[prompt.category].append(prompt)
    turns = zip_longest(*(groups[name] for name in sorted(groups)))
    return [prompt for turn in turns for prompt in turn if prompt is not None][:count]
