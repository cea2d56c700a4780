"""Converts a GGUF file, once, into an ordinary model folder in the user's cache.

The folder is named by the file's content. Weights are dequantised to bfloat16, since the passes of
this runtime read 16-bit weights. The file is untrusted: its header is checked before transformers
parses it, it holds no code, and the finished folder is checked like any other.
"""

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers import __version__ as transformers_version
from transformers.utils.quantization_config import GgufConfig

from runtime.core.cache_folder import cache_folder
from runtime.core.errors import ModelRefused
from runtime.models.gguf_header import GgufHeader, read_header
from runtime.models.quiet import one_line, quiet_transformers

VERSION = 1  # of the conversion: a folder of another version is not used
LINK = "model.gguf"
BYTES_PER_WEIGHT = 2
SPARE_BYTES = 64 << 20  # for the tokenizer and the header
PARSE_ERRORS = (
    OSError,
    ImportError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    StrictDataclassError,
)

log = logging.getLogger(__name__)


def is_gguf(file: Path) -> bool:
    return file.suffix.lower() == ".gguf" and file.is_file()


def converted_folder(file: Path) -> Path:
    """Return the folder of a GGUF file's model; convert it if that has not been done.

    Processes that ask for the same file wait for the one that converts it. What an interrupted
    conversion left is removed by the next one. Raises ModelRefused for a file that cannot be
    converted, and for a cache folder that cannot be written.
    """
    cache = cache_folder() / "gguf"
    with refuse_unwritable(file, cache):
        cache.mkdir(parents=True, exist_ok=True)
        folder = cache / f"{content_hash(file, cache)[:32]}-{VERSION}"
        if folder.is_dir():
            return folder
        with FileLock(cache / f"{folder.name}.lock", fallback_to_soft=False):
            if not folder.is_dir():
                convert(file, folder)
        return folder


@contextlib.contextmanager
def refuse_unwritable(file: Path, cache: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ModelRefused(
            f"{file} cannot be converted in {cache} ({one_line(error)}): "
            "free or choose a place with XDG_CACHE_HOME"
        ) from error


def content_hash(file: Path, cache: Path) -> str:
    """Return the hex sha256 of a file, from the cache if the file has not changed since."""
    seen = file.stat()
    state = f"{file.resolve()}\n{seen.st_size}\n{seen.st_mtime_ns}\n{seen.st_ino}"
    record = cache / f"{hashlib.sha256(state.encode()).hexdigest()[:32]}.sha256"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        known = record.read_text()
        if len(known) == 64:
            return known
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    fresh = record.with_suffix(f".{os.getpid()}")
    fresh.write_text(found)
    fresh.replace(record)
    return found


def convert(file: Path, folder: Path) -> None:
    """Write the model of `file` to `folder`, which appears only when it is whole."""
    header = read_header(file)
    needed = header.parameters * BYTES_PER_WEIGHT + SPARE_BYTES
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise ModelRefused(
            f"{file} needs {needed >> 20} MiB in {folder.parent}, which has {free >> 20} MiB: "
            "free or choose a place with XDG_CACHE_HOME"
        )
    log.warning(
        "%s (%d MiB, %d million weights of %s) is converted once: its weights become bfloat16 "
        "(%d MiB) in %s",
        file.name,
        file.stat().st_size >> 20,
        header.parameters // 10**6,
        ", ".join(header.types),
        header.parameters * BYTES_PER_WEIGHT >> 20,
        folder,
    )
    partial, source = (folder.with_name(f"{folder.name}.{part}") for part in ("partial", "source"))
    for left in (partial, source):
        shutil.rmtree(left, ignore_errors=True)
        left.mkdir()
    try:
        # The parsers look for further files beside the one that they read, so it is alone.
        (source / LINK).symlink_to(file.resolve())
        write_folder(file, source, header, partial)
        partial.rename(folder)
    finally:
        for left in (partial, source):
            shutil.rmtree(left, ignore_errors=True)


def write_folder(file: Path, source: Path, header: GgufHeader, folder: Path) -> None:
    with refuse_unreadable(file, header), quiet_transformers():
        config = AutoConfig.from_pretrained(source, gguf_file=LINK, local_files_only=True)
        check_parameters(file, config, header)
        loader: Any = AutoModelForCausalLM
        module, report = loader.from_pretrained(
            source,
            gguf_file=LINK,
            config=config,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            source, gguf_file=LINK, local_files_only=True, trust_remote_code=False
        )
    wrong = sorted(str(key) for key in (*report["missing_keys"], *report["mismatched_keys"]))
    if wrong:
        raise ModelRefused(
            f"{file} lacks {len(wrong)} of its weights, {wrong[0][:100]} among them: copy it again"
        )
    module.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        pad_token_id=config.pad_token_id,
        eos_token_id=end_tokens(header, config.vocab_size) or None,
    )
    with quiet_transformers():
        module.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def refuse_unreadable(file: Path, header: GgufHeader) -> Iterator[None]:
    try:
        yield
    except PARSE_ERRORS as error:
        raise ModelRefused(
            f"{file} (architecture {header.architecture[:64]!r}) cannot be read by transformers "
            f"{transformers_version} ({one_line(error)}): choose another file, or a folder with "
            "safetensors"
        ) from error


def check_parameters(file: Path, config: Any, header: GgufHeader) -> None:
    """Raise ModelRefused if the configuration needs more weights than the file has.

    transformers would allocate what is missing and fill it with random numbers.
    """
    with torch.device("meta"):
        module: Any = AutoModelForCausalLM.from_config(config)
    needed = sum(parameter.numel() for parameter in module.parameters())
    if needed > header.parameters:
        raise ModelRefused(
            f"{file} has {header.parameters} of the {needed} weights that it describes: "
            "copy it again"
        )


def end_tokens(header: GgufHeader, vocabulary: int) -> list[int]:
    """Return the ids that end a text or a turn: a chat model may have one for each."""
    found = (header.number(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return sorted({token for token in found if token is not None and 0 <= token < vocabulary})
