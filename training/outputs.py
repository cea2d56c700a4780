"""What the target itself writes: texts to distil from and, of held-out beginnings, texts to be measured on.

They come out of the runtime, as users get them, and are kept in the user's cache by target, data and seed: the next method that is
trained for this target finds them there, and who is interrupted goes on.
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
from training.folder import write
from training.text import Corpus, excerpts, windows

Generate = Callable[[Request], AsyncIterator[Chunk]]

TEMPERATURES = (0.0, 0.5, 1.0)  # of the texts to learn from, in turn
MEASURED = (0.0, 0.8)  # of the held-out ones
HELD_OUT, LONGEST = 16, 96  # beginnings, and tokens of each answer
TOGETHER = 16  # texts under way at one time, and in one file


@dataclass(frozen=True, slots=True)
class Written:
    """What the target answered to a prompt."""

    prompt: Tokens
    output: Tokens
    sampling: SamplingParams


def to_learn(corpus: Corpus, tokens: int, context: int, seed: int) -> list[Request]:
    """Requests whose answers have about `tokens` tokens together; prompt and answer are `context` tokens long."""
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


def to_measure(corpus: Corpus, context: int, seed: int) -> list[Request]:
    """The same held-out beginnings at each of MEASURED."""
    prompt = context // 4
    beginnings = excerpts(corpus.held_out, HELD_OUT, prompt)
    return [
        Request(
            f"held-{temperature}-{index}",
            beginning,
            sampling(temperature, seed + index, min(LONGEST, context - prompt)),
        )
        for temperature in MEASURED
        for index, beginning in enumerate(beginnings)
    ]


def sampling(temperature: float, seed: int, tokens: int) -> SamplingParams:
    return SamplingParams(temperature=temperature, seed=seed, max_tokens=tokens, ignore_eos=True)


def named(fingerprint: str, requests: Sequence[Request]) -> str:
    """Of the folder that keeps the answers."""
    return hashlib.sha256(
        f"{fingerprint} {[(request.prompt, request.sampling) for request in requests]}".encode()
    ).hexdigest()[:16]


def grouped(requests: Sequence[Request]) -> list[Sequence[Request]]:
    return [requests[start : start + TOGETHER] for start in range(0, len(requests), TOGETHER)]


def missing(folder: Path, requests: Sequence[Request]) -> int:
    """How many answers are not there yet."""
    return sum(
        len(group) for number, group in enumerate(grouped(requests)) if not there(folder, number)
    )


async def answer(
    generate: Generate, requests: Sequence[Request], folder: Path, tell: Callable[[int], None]
) -> None:
    """Write the answers that are missing; `tell` hears how many more there are. Raises Unavailable where the target fails."""
    for number, group in enumerate(grouped(requests)):
        if not there(folder, number):
            keep(
                folder, number, await asyncio.gather(*(one(generate, request) for request in group))
            )
            tell(len(group))


async def one(generate: Generate, request: Request) -> list[int]:
    tokens: list[int] = []
    async for chunk in generate(request):
        tokens += chunk.tokens
        if chunk.finish_reason == "length":
            return tokens
        if chunk.finish_reason is not None:
            break
    raise Unavailable(
        "the target failed while it wrote texts to learn from: see its log, then give the same command again"
    )


def part(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.npy"


def there(folder: Path, number: int) -> bool:
    return part(folder, number).exists()


def keep(folder: Path, number: int, answers: Sequence[Sequence[int]]) -> None:
    rows = np.full((len(answers), max(map(len, answers))), -1, dtype=np.int32)
    for row, tokens in zip(rows, answers, strict=True):
        row[: len(tokens)] = tokens
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    folder.mkdir(parents=True, exist_ok=True)
    write(part(folder, number), buffer.getvalue())


def answered(folder: Path, requests: Sequence[Request]) -> list[Written]:
    """All answers, in order of the requests."""
    found = [row for number in range(len(grouped(requests))) for row in load(part(folder, number))]
    return [
        Written(request.prompt, tuple(row[row >= 0].tolist()), request.sampling)
        for request, row in zip(requests, found, strict=True)
    ]


def load(file: Path) -> npt.NDArray[np.int32]:
    rows: npt.NDArray[np.int32] = np.load(file, allow_pickle=False)
    return rows


def rows_of(written: Sequence[Written]) -> npt.NDArray[np.int32]:
    """Prompts and answers as texts of equal length (n, context)."""
    return np.array([[*text.prompt, *text.output] for text in written], dtype=np.int32)
