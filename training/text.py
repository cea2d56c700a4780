"""Training texts: documents as token ids, one in twenty held out, and batches that depend only on
seed and step."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from runtime.core.errors import InvalidRequest

Stream = npt.NDArray[np.int32]

HELD_OUT_SHARE = 20  # one document in twenty
MAX_BYTES = 1 << 30  # of all documents, which are held in memory


@dataclass(frozen=True, slots=True)
class Document:
    """A document; `name` decides whether it is held out, so it should be the same on every
    machine."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents as two streams of token ids, with the end-of-text token, if any, after every
    document."""

    train: Stream
    held_out: Stream
    documents: int
    digest: str  # sha256 of both


def read_documents(paths: Sequence[Path]) -> list[Document]:
    """Read files, and folders recursively, sorted by name.

    In folders, hidden files and files that are not UTF-8 are skipped. Raises InvalidRequest for a
    missing or unreadable path, a given file that is not UTF-8, and if there is no text.
    """
    found = [
        document
        for path in paths
        for document in (read_folder(path) if path.is_dir() else [read_file(path, path.name)])
    ]
    if not any(document.text.strip() for document in found):
        raise InvalidRequest(
            f"no text in {', '.join(map(str, paths))[:200] or 'no files'}: give files or "
            "folders of UTF-8 text",
            "data",
        )
    if (size := sum(len(document.text) for document in found)) > MAX_BYTES:
        raise InvalidRequest(
            f"{size} characters of text: at most {MAX_BYTES} are read, give fewer files", "data"
        )
    return found


def read_folder(folder: Path) -> Iterator[Document]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(part.startswith(".") for part in Path(name).parts):
            try:
                yield read_file(path, name)
            except UnicodeError:
                continue


class NotUtf8(InvalidRequest, UnicodeError):
    """The file is not UTF-8."""


def read_file(path: Path, name: str) -> Document:
    try:
        return Document(name, path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise NotUtf8(
            f"{path} is not UTF-8 (byte {error.start}): convert it first", "data"
        ) from error
    except OSError as error:
        raise InvalidRequest(
            f"cannot read {path} ({error.strerror}): give files or folders of UTF-8 text", "data"
        ) from error


def hash_bucket(name: str, of: int) -> int:
    """Return a number in [0, of) that depends only on the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % of


def split_documents(documents: Sequence[Document]) -> tuple[list[str], list[str]]:
    """Return training texts and held-out texts.

    One document in twenty is held out, by a hash of its name; if there are few documents, the end
    of each.
    """
    parts: tuple[list[str], list[str]] = ([], [])
    if len(documents) >= 2 * HELD_OUT_SHARE:
        for document in documents:
            parts[hash_bucket(document.name, HELD_OUT_SHARE) == 0].append(document.text)
    if parts[0] and parts[1]:
        return parts
    cuts = [len(document.text) - len(document.text) // HELD_OUT_SHARE for document in documents]
    return (
        [document.text[:cut] for document, cut in zip(documents, cuts, strict=True)],
        [document.text[cut:] for document, cut in zip(documents, cuts, strict=True)],
    )


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], end: int | None) -> Stream:
    ends = [] if end is None else [end]
    runs = [
        np.array([*encoding.ids, *ends], dtype=np.int32)
        for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)
    ]
    return np.concatenate([np.zeros(0, np.int32), *runs])


def build_corpus(
    documents: Sequence[Document], tokenizer: Tokenizer, end: int | None, least: int
) -> Corpus:
    """Tokenize the documents.

    Raises InvalidRequest if there are fewer than `least` tokens to train on or held out.
    """
    train, held_out = (encode_texts(tokenizer, texts, end) for texts in split_documents(documents))
    if len(train) < least or len(held_out) < least:
        short = "to learn from" if len(train) < least else "held out"
        raise InvalidRequest(
            f"{len(train)} tokens to learn from and {len(held_out)} held out: at least "
            f"{least} {short} are needed",
            "data",
        )
    digest = hashlib.sha256(train.tobytes() + b"|" + held_out.tobytes()).hexdigest()
    return Corpus(train, held_out, len(documents), digest)


def excerpts(stream: Stream, count: int, length: int) -> list[tuple[int, ...]]:
    """Return up to `count` evenly spaced excerpts of `length` tokens that do not overlap."""
    count = min(count, len(stream) // length)
    starts = [index * (len(stream) // count) for index in range(count)]
    return [tuple(stream[start : start + length].tolist()) for start in starts]


def windows(stream: Stream, context: int, seed: int) -> Callable[[int], Stream]:
    """Return a function from i to window number i of `context` tokens.

    Every epoch cuts the stream at another offset, in another order. `stream` must have at least
    twice as many tokens as a window.
    """
    count = len(stream) // context - 1

    @lru_cache(maxsize=2)
    def epoch(number: int) -> tuple[int, npt.NDArray[np.int64]]:
        generator = np.random.default_rng([seed, number])
        return int(generator.integers(context)), generator.permutation(count)

    def window(index: int) -> Stream:
        offset, order = epoch(index // count)
        start = offset + int(order[index % count]) * context
        return stream[start : start + context]

    return window


def text_rows(rows: npt.NDArray[np.int32], seed: int) -> Callable[[int], Stream]:
    """Return a function from i to row number i of texts of equal length (n, context).

    Every epoch has another order.
    """

    @lru_cache(maxsize=2)
    def epoch(number: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([seed, number]).permutation(len(rows))

    return lambda index: rows[epoch(index // len(rows))[index % len(rows)]]


def make_batches(
    sources: Sequence[Callable[[int], Stream]], size: int
) -> Callable[[int], torch.Tensor]:
    """Return a function from i to batch number i, int64 (size, context), which alternates the
    sources."""

    def batch(step: int) -> torch.Tensor:
        numbers = range(step * size, (step + 1) * size)
        rows = [sources[number % len(sources)](number // len(sources)) for number in numbers]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    return batch
