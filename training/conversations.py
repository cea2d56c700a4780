"""Conversations that the target writes by itself, prompts included, from the opening of its chat
template (Magpie, arXiv 2406.08464).

The user's turn is sampled at temperature 1 until it ends, and the answer at the temperatures of
training.
"""

import hashlib
import io
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from runtime.core.errors import ModelRefused
from runtime.core.messages import Tokens
from training.folder import write_atomically
from training.outputs import TEMPERATURES
from training.row_sampler import write_texts
from training.teacher import Teacher, fast_copy

ROWS = 128  # conversations that are written at once; a file holds those of `context` passes
PROMPT_TEMPERATURE = 1.0
MAX_PROMPT_TOKENS = 160  # the user's text is cut there, and answered as it is
MIN_ANSWER = 16  # tokens
LOOP_WINDOW, LOOP_CHECK = 64, 32  # tokens that are looked at, and how often
RUN, MIN_DISTINCT = 4, 0.6  # length of the sequences counted in a window; least share of new ones
USER = "[user text]"  # stands for the user's text when the template is split

# Openings of the user's turn; the empty ones leave the task to the target. Without the others a
# small target writes mostly essays and rewriting tasks.
OPENINGS = (
    "", "", "", "",
    "What", "How", "Who", "When did", "Why",
    "Write", "Explain", "Compare", "Imagine", "Compose",
    "Summarize the following text:", "Summarize:",
    "Translate the following sentence to English:", "Translate",
    "Solve", "A train", "If", "There are",
    "Implement a function", "Write a Python program that",
    "Answer the question using the text below.\n\n", "Read the passage and answer.\n\n",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Opening:
    """The fixed parts of a conversation, as tokens.

    before  what precedes the sampled part of the user's text
    bridge  what stands between the user's text and the answer
    ends    the tokens that end a turn
    """

    before: Tokens
    bridge: Tokens
    ends: frozenset[int]


class Conversation:
    """A conversation in the making: a Text of training.row_sampler.

    start  number of tokens before the answer; 0 while the user's text is written
    """

    def __init__(self, opening: Opening, temperature: float) -> None:
        self.opening, self.answer_temperature = opening, temperature
        self.tokens, self.start = list(opening.before), 0
        self.temperature = PROMPT_TEMPERATURE

    def add(self, token: int) -> bool:
        self.tokens.append(token)
        ended = token in self.opening.ends
        if self.start:
            return not ended and not (len(self.tokens) % LOOP_CHECK == 0 and loops(self.answer))
        if ended or len(self.tokens) - len(self.opening.before) >= MAX_PROMPT_TOKENS:
            self.tokens[len(self.tokens) - ended :] = self.opening.bridge
            self.start, self.temperature = len(self.tokens), self.answer_temperature
        return True

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.start :]


def loops(tokens: Sequence[int]) -> bool:
    """Return whether the last tokens repeat themselves: too few different sequences of four."""
    last = tokens[-LOOP_WINDOW:]
    runs = [tuple(last[at : at + RUN]) for at in range(len(last) - RUN + 1)]
    return len(last) == LOOP_WINDOW and len(set(runs)) < MIN_DISTINCT * len(runs)


def usable(found: Iterable[Conversation]) -> list[Conversation]:
    """Return the conversations with an answer, each prompt once, without the loops that end
    them."""
    prompts: set[Tokens] = set()
    kept = []
    for one in found:
        prompt = tuple(one.tokens[: one.start])
        if one.start and loops(one.answer):
            del one.tokens[-LOOP_WINDOW:]
        if one.start and len(one.answer) >= MIN_ANSWER:
            if prompt not in prompts:
                kept.append(one)
            prompts.add(prompt)
    return kept


def openings(tokenizer: PreTrainedTokenizerFast) -> list[Opening]:
    """Return the openings of a target's conversations.

    Raises ModelRefused for a chat template that does not show the user's text as it is.
    """
    ends = {tokenizer.eos_token_id} - {None}
    text: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": USER}], tokenize=False, add_generation_prompt=True
    )
    before, found, bridge = text.partition(USER)
    after = encode(tokenizer, bridge)
    if not found or not after:
        raise ModelRefused("the chat template changes the user's text: give --data, and --own 0")
    return [
        Opening(encode(tokenizer, before + opening), after, frozenset({after[0], *ends}))
        for opening in OPENINGS
    ]


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tokens:
    return tuple(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def begin_all(openings: Sequence[Opening], seed: int) -> Iterator[Conversation]:
    """Yield conversations without end, with openings in random order and temperatures in
    rotation."""
    generator = random.Random(seed)
    for temperature in itertools.cycle(TEMPERATURES):
        yield Conversation(generator.choice(openings), temperature)


@dataclass(frozen=True, slots=True)
class OwnText:
    """A finished conversation; `start` is the number of tokens before the answer."""

    tokens: Tokens
    start: int

    @property
    def prompt(self) -> Tokens:
        return self.tokens[: self.start]


def own_conversations(
    teacher: Teacher,
    folder: Path,
    tokens: int,
    context: int,
    seed: int,
    tell: Callable[[int], None],
) -> list[OwnText]:
    """Return conversations of about `tokens` tokens in total and at most `context` tokens each.

    They come from `folder` as far as they are there; missing ones are written. `tell` receives the
    tokens of each file. Raises ModelRefused for a target whose texts are all unusable.
    """
    made: list[OwnText] = []
    total, number, beginnings = 0, 0, openings(teacher.tokenizer)
    module: Any = None
    while total < tokens:
        file = folder / f"{number:06}.npz"
        if not file.exists():
            module = module or fast_copy(teacher)
            begun = begin_all(beginnings, seed + number)
            save(file, usable(write_texts(module, begun, ROWS, context, seed + number)))
        found = load(file)
        if not found:
            raise ModelRefused(
                f"model {teacher.model.name} writes no usable conversations (they loop or have no "
                "answer): give --data, and --own 0"
            )
        made += found
        size = sum(len(text.tokens) for text in found)
        tell(min(size, tokens - total))
        total, number = total + size, number + 1
    return made


def folder_name(fingerprint: str, context: int, seed: int) -> str:
    """Return the name of the folder that keeps the conversations of a target."""
    about = f"{fingerprint} {ROWS} {context} {seed} {OPENINGS} {TEMPERATURES}"
    return f"own-{hashlib.sha256(about.encode()).hexdigest()[:16]}"


def save(file: Path, texts: Sequence[Conversation]) -> None:
    rows = np.full((len(texts), max((len(one.tokens) for one in texts), default=0)), -1, np.int32)
    for row, one in zip(rows, texts, strict=True):
        row[: len(one.tokens)] = one.tokens
    buffer = io.BytesIO()
    np.savez(buffer, tokens=rows, starts=np.array([one.start for one in texts], np.int32))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, buffer.getvalue())


def load(file: Path) -> list[OwnText]:
    with np.load(file, allow_pickle=False) as found:
        return [
            OwnText(tuple(row[row >= 0].tolist()), int(start))
            for row, start in zip(found["tokens"], found["starts"], strict=True)
        ]


def packed(texts: Sequence[OwnText], context: int) -> npt.NDArray[np.int32]:
    """Return the conversations one after the other, in rows (n, context)."""
    stream = np.array([token for text in texts for token in text.tokens], dtype=np.int32)
    return stream[: len(stream) // context * context].reshape(-1, context)
