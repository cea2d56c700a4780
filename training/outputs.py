"""The target's own texts: for distillation and, continuing held-out texts, for measuring.

The runtime generates them, as for users. They are kept in the user's cache by target, data and
seed, so the next method trained for this target reuses them, and an interrupted run resumes.
"""

import asyncio
import hashlib
import io
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from runtime.core.errors import Unavailable
from runtime.core.messages import Chunk, Request, Tokens
from runtime.core.sampling_params import SamplingParams
from training.folder import write_atomically
from training.text import Corpus, excerpts, windows

Generate = Callable[[Request], AsyncIterator[Chunk]]

TEMPERATURES = (0.0, 0.5, 1.0)  # of the training texts, in rotation
HELD_OUT_TEMPERATURES = (0.0, 0.8)  # of the held-out texts
HELD_OUT_COUNT, MAX_ANSWER_TOKENS = 16, 96  # held-out prompts, and maximum tokens of an answer
GROUP_SIZE = 16  # concurrent texts, stored in one file


@dataclass(frozen=True, slots=True)
class TargetText:
    """A prompt with the target's answer."""

    prompt: Tokens
    output: Tokens
    sampling: SamplingParams


def training_requests(corpus: Corpus, tokens: int, context: int, seed: int) -> list[Request]:
    """Return requests with about `tokens` answer tokens in total.

    Prompt and answer together have `context` tokens.
    """
    prompt = context // 4
    window = windows(corpus.train, prompt, seed)
    count = -(-tokens // (context - prompt))
    return [
        Request(
            f"own-{index}",
            tuple(window(index).tolist()),
            sampling(TEMPERATURES[index % 3], seed + index, context - prompt),
        )
        for index in range(count)
    ]


def held_out_requests(corpus: Corpus, context: int, seed: int) -> list[Request]:
    """Return the same held-out prompts at each of HELD_OUT_TEMPERATURES."""
    prompt = context // 4
    beginnings = excerpts(corpus.held_out, HELD_OUT_COUNT, prompt)
    return [
        Request(
            f"held-{temperature}-{index}",
            beginning,
            sampling(temperature, seed + index, min(MAX_ANSWER_TOKENS, context - prompt)),
        )
        for temperature in HELD_OUT_TEMPERATURES
        for index, beginning in enumerate(beginnings)
    ]


def prompt_requests(prompts: Sequence[Tokens], name: str, context: int, seed: int) -> list[Request]:
    """Return requests for answers, until they end, to each prompt at each of
    HELD_OUT_TEMPERATURES.

    Prompts that leave no room in a context of `context` tokens are left out.
    """
    return [
        Request(
            f"{name}-{temperature}-{index}",
            prompt,
            SamplingParams(
                temperature=temperature,
                seed=seed + index,
                max_tokens=min(MAX_ANSWER_TOKENS, context - len(prompt)),
            ),
        )
        for temperature in HELD_OUT_TEMPERATURES
        for index, prompt in enumerate(prompts)
        if len(prompt) < context
    ]


def sampling(temperature: float, seed: int, tokens: int) -> SamplingParams:
    return SamplingParams(temperature=temperature, seed=seed, max_tokens=tokens, ignore_eos=True)


def folder_name(fingerprint: str, requests: Sequence[Request]) -> str:
    """Return the name of the folder that keeps the answers."""
    return hashlib.sha256(
        f"{fingerprint} {[(request.prompt, request.sampling) for request in requests]}".encode()
    ).hexdigest()[:16]


def groups_of(requests: Sequence[Request]) -> list[Sequence[Request]]:
    return [requests[start : start + GROUP_SIZE] for start in range(0, len(requests), GROUP_SIZE)]


def count_missing(folder: Path, requests: Sequence[Request]) -> int:
    """Count the answers that are still missing."""
    return sum(
        len(group)
        for number, group in enumerate(groups_of(requests))
        if not has_answers(folder, number)
    )


async def write_answers(
    generate: Generate, requests: Sequence[Request], folder: Path, tell: Callable[[int], None]
) -> None:
    """Write the missing answers; `tell` receives the number of new ones.

    Raises Unavailable if the target fails.
    """
    for number, group in enumerate(groups_of(requests)):
        if not has_answers(folder, number):
            save_answers(
                folder,
                number,
                await asyncio.gather(*(generate_one(generate, request) for request in group)),
            )
            tell(len(group))


async def generate_one(generate: Generate, request: Request) -> list[int]:
    tokens: list[int] = []
    async for chunk in generate(request):
        tokens += chunk.tokens
        if chunk.finish_reason in ("length", "stop"):
            return tokens
        if chunk.finish_reason is not None:
            break
    raise Unavailable(
        "the target failed while it wrote training texts: see its log, then run the same "
        "command again"
    )


def answer_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.npy"


def has_answers(folder: Path, number: int) -> bool:
    return answer_file(folder, number).exists()


def save_answers(folder: Path, number: int, answers: Sequence[Sequence[int]]) -> None:
    rows = np.full((len(answers), max(map(len, answers))), -1, dtype=np.int32)
    for row, tokens in zip(rows, answers, strict=True):
        row[: len(tokens)] = tokens
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(answer_file(folder, number), buffer.getvalue())


def read_answers(folder: Path, requests: Sequence[Request]) -> list[TargetText]:
    """Return all answers in the order of the requests."""
    found = [
        row
        for number in range(len(groups_of(requests)))
        for row in load_rows(answer_file(folder, number))
    ]
    return [
        TargetText(request.prompt, tuple(row[row >= 0].tolist()), request.sampling)
        for request, row in zip(requests, found, strict=True)
    ]


def load_rows(file: Path) -> npt.NDArray[np.int32]:
    rows: npt.NDArray[np.int32] = np.load(file, allow_pickle=False)
    return rows


def rows_of(written: Sequence[TargetText]) -> npt.NDArray[np.int32]:
    """Return prompts with answers as texts of equal length (n, context)."""
    return np.array([[*text.prompt, *text.output] for text in written], dtype=np.int32)
