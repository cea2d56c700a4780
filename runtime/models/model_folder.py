"""Finds the folder that a model's name means. Every command and actor comes through here."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from runtime.core.errors import ModelRefused
from runtime.models.catalogue import CATALOGUE
from runtime.models.gguf_model import converted_folder, is_gguf

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_FILE_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
HUB_TIMEOUT_S = 5.0  # seconds


def find_folder(name: str) -> Path:
    """Return the folder of a model: a folder itself, a GGUF file, a pulled model or a hub name.

    A GGUF file is converted once, a hub name is downloaded if necessary. Raises ModelRefused.
    """
    if not name or "\0" in name or len(name) > 1024:
        raise ModelRefused(
            f"invalid model name {name[:64]!r}: give a folder or a name on the Hugging Face hub"
        )
    folder = Path(name)
    if folder.is_dir():
        return folder
    if is_gguf(folder):
        return converted_folder(folder)
    if folder.exists():
        raise ModelRefused(
            f"{name} is a file: give the folder that holds config.json and the weights, "
            "or a .gguf file"
        )
    if name in CATALOGUE:
        pulled = CATALOGUE[name].file()
        if not pulled.is_file():
            raise ModelRefused(f"model {name} is not on this machine: run `outrider pull {name}`")
        return converted_folder(pulled)
    if folder.suffix.lower() == ".gguf":
        raise ModelRefused(
            f"model file {name[:256]!r} does not exist: give the path of a GGUF file"
        )
    if not HUB_NAME.fullmatch(name):
        raise ModelRefused(
            f"model folder {name[:256]!r} does not exist: "
            "give a folder with config.json and *.safetensors"
        )
    return download_snapshot(name)


def download_snapshot(name: str) -> Path:
    """Return the local copy of a model on the Hugging Face hub; complete it if necessary.

    Raises ModelRefused.
    """
    try:
        return Path(
            snapshot_download(name, allow_patterns=HUB_FILE_PATTERNS, etag_timeout=HUB_TIMEOUT_S)
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise ModelRefused(
            f"model {name} is not a folder and not available from the Hugging Face hub "
            f"({type(error).__name__}): "
            "check the name or the network, or give a folder"
        ) from error
