"""The corpus of the shipped pair: the standard library of the running Python interpreter.

A hash of its path assigns a file to the held-out split, so the split is the same on every machine
and for every Python version that has the file.
"""

import sysconfig
import tokenize
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from training.text import HELD_OUT_SHARE, hash_bucket

END_OF_TEXT = "<|endoftext|>"
TESTS_SHARE = 4  # one test module in four: tests outnumber the library itself
EXCLUDED_PREFIXES = (
    "encodings/",
    "pydoc_data/",
    "lib2to3/tests/data/",
    "site-packages/",
    "unidata_version",
)


def standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def library_files(held_out: bool) -> list[str]:
    """Return paths relative to the standard library, sorted."""
    root = standard_library()
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return [
        name
        for name in names
        if is_wanted(name) and (hash_bucket(name, HELD_OUT_SHARE) == 0) == held_out
    ]


def is_wanted(name: str) -> bool:
    if name.startswith(EXCLUDED_PREFIXES):
        return False
    is_test = name.startswith("test/") or "/test" in name
    return not is_test or hash_bucket("tests:" + name, TESTS_SHARE) == 0


def read_source(name: str) -> str:
    """Return the source text, or "" if the file is invalid on purpose, as some tests are."""
    try:
        with tokenize.open(standard_library() / name) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError, OSError):
        return ""


def token_stream(tokenizer: Tokenizer, names: Sequence[str]) -> npt.NDArray[np.uint16]:
    """Return all files as one stream of token ids, each followed by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    texts = tokenizer.encode_batch([read_source(name) for name in names])
    return np.concatenate([np.array([*text.ids, end], dtype=np.uint16) for text in texts])


def prompts(tokenizer: Tokenizer, count: int, length: int) -> list[list[int]]:
    """Return the first `count` held-out excerpts of `length` tokens, one per file.

    Each starts at a top-level definition.
    """
    found: list[list[int]] = []
    for name in library_files(held_out=True):
        text = read_source(name)
        start = max(text.find("\nclass "), text.find("\ndef "))
        ids = tokenizer.encode(text[start + 1 :]).ids
        if start >= 0 and len(ids) >= 2 * length:
            found.append(ids[:length])
        if len(found) == count:
            return found
    return found
