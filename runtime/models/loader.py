"""Loads a model from a folder or hub name and verifies it. Everything in the folder is untrusted.

Only safetensors are read, no code of the model's author runs, and no file outside the folder is
opened.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from runtime.core.errors import InvalidRequest, ModelRefused
from runtime.models.fast_path import enable_fast_path, enable_static_path
from runtime.models.hf import MODEL_ERRORS, HFModel, check_config
from runtime.models.layer_subset import every_second_layer, keep_layers, truncated_config
from runtime.models.model_folder import find_folder
from runtime.models.quiet import one_line, quiet_transformers
from runtime.models.rollback_check import check_rollback
from runtime.models.template_probe import check_template

Step = Literal["auto", "generic", "static"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INDEX_FILE = "model.safetensors.index.json"
# Maximum size of each file that is read in full, and of a template.
MAX_FILE_BYTES = {
    "config.json": 1 << 20,
    **dict.fromkeys(
        (
            "generation_config.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
        ),
        1 << 24,
    ),
    **dict.fromkeys(
        ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", INDEX_FILE),
        1 << 27,
    ),
}
MAX_TEMPLATE_BYTES = 1 << 20
TEMPLATE_FOLDER = "additional_chat_templates"  # the only subfolder that is read
# transformers' name for a warning that it prints once. Our own error replaces it.
TOO_LONG_WARNING = "sequence-length-is-longer-than-the-specified-maximum"
CODE_KEYS = (
    "auto_map",
    "custom_generate",
    "custom_pipelines",
)  # keys of configurations that name code of the author's
KERNEL_KEYS = (
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
    "kernel_config",
)


def load_model(
    name_or_folder: str,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    step: Step = "auto",
    layers: Sequence[int] | None = None,
    change: Callable[[PreTrainedModel], None] = lambda module: None,
) -> HFModel:
    """Load a folder with config.json and safetensors, or a name on the Hugging Face hub.

    dtype    "auto" is float32 on a CPU and the checkpoint's own type on a GPU
    device   "auto" is the first GPU if there is one
    threads  sets torch's threads for the whole process
    step     "generic" uses transformers' own code for every pass; "auto" installs a faster pass
             that agrees with it; "static" does so with the pass of fixed shapes, made for GPUs, on
             any device
    layers   numbers of the layers to load; an empty list means every second one
    change   may modify the module in place before it is verified

    Raises ModelRefused for the model, InvalidRequest for the dtype or device.
    """
    place = find_device(device)
    kind = find_dtype(dtype, place)
    folder = find_folder(name_or_folder)
    config = read_config(folder, name_or_folder)
    check_weights(folder, name_or_folder)
    if threads is not None:
        torch.set_num_threads(threads)
    if layers is None:
        module = read_weights(folder, name_or_folder, config, kind, place)
    else:
        kept = list(layers) or every_second_layer(config)
        module = read_weights(
            folder, name_or_folder, truncated_config(config, kept, name_or_folder), kind, place
        )
        keep_layers(module, kept, name_or_folder)
    change(module)
    model = HFModel(module, name_or_folder)
    if step == "auto":
        enable_fast_path(model)
    elif step == "static":
        enable_static_path(model)
    check_rollback(model)
    return model


def load_tokenizer(name_or_folder: str) -> PreTrainedTokenizerFast:
    """Load the tokenizer.json of a folder or hub name, and test its chat template.

    Raises ModelRefused.
    """
    folder = find_folder(name_or_folder)
    if not (folder / "tokenizer.json").is_file():
        raise ModelRefused(
            f"{name_or_folder} has no tokenizer.json: "
            "save a fast tokenizer into it with save_pretrained()"
        )
    reject_remote_code(folder, name_or_folder)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (
        Exception
    ) as error:  # the Rust tokenizers raise plain Exception for a file they cannot parse
        raise ModelRefused(
            f"{name_or_folder}/tokenizer.json cannot be read ({one_line(error)}): copy it again"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelRefused(
            f"{name_or_folder} has a tokenizer of type {type(tokenizer).__name__}: "
            "save a fast one into it"
        )
    check_template(tokenizer.chat_template, name_or_folder)
    tokenizer.deprecation_warnings[TOO_LONG_WARNING] = True
    return tokenizer


def find_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise InvalidRequest(
            f"unknown device {device[:64]!r}: give auto, cpu, cuda or cuda:0", "device"
        )
    found = torch.device(device)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InvalidRequest(
            f"device {device} not found ({torch.cuda.device_count()} GPUs): give auto or cpu",
            "device",
        )
    return found


def find_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    if dtype == "auto":
        return "auto" if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise InvalidRequest(
            f"unknown dtype {dtype[:64]!r}: give auto, {', '.join(DTYPES)}", "dtype"
        )
    return DTYPES[dtype]


def reject_remote_code(folder: Path, name: str) -> None:
    """Raise ModelRefused for code of the model's author and for links out of the folder.

    Links of the hub's local cache to its own blobs are allowed.
    """
    for script in folder.glob("*.py"):
        raise ModelRefused(
            f"{name} contains its own code ({script.name}): choose a model that transformers knows"
        )
    root = folder.resolve()
    root = root.parents[1] if root.parent.name == "snapshots" else root
    inner = folder / TEMPLATE_FOLDER
    for file in (*folder.iterdir(), *(inner.iterdir() if inner.is_dir() else ())):
        if not resolve_path(file).is_relative_to(root):
            raise ModelRefused(
                f"{name}/{file.name} is a link that leads out of the folder: copy the file into it"
            )
        most = MAX_FILE_BYTES.get(file.name) or (
            MAX_TEMPLATE_BYTES if file.suffix == ".jinja" else None
        )
        if most is not None and file.is_file() and file.stat().st_size > most:
            raise ModelRefused(
                f"{name}/{file.name} is larger than {most >> 20} MiB: choose another model"
            )
    for file in (
        folder / "config.json",
        folder / "tokenizer_config.json",
        folder / "generation_config.json",
    ):
        if file.is_file() and (asked := remote_code_key(read_json(file, name))):
            raise ModelRefused(
                f"{name}/{file.name} requires its own code ({asked}): "
                "choose a model that transformers knows"
            )


def remote_code_key(settings: dict[str, Any]) -> str | None:
    """Return a key, at any depth, that names code of the author: a module, or a kernel
    "owner/name".
    """
    waiting: list[object] = [settings]
    while waiting:
        match waiting.pop():
            case dict() as entries:
                for key, value in entries.items():
                    if key in CODE_KEYS or (key in KERNEL_KEYS and "/" in str(value)):
                        return str(key)
                waiting.extend(entries.values())
            case list() as values:
                waiting.extend(values)
    return None


def resolve_path(file: Path) -> Path:
    """Resolve a path; a link that leads only to itself resolves to the file system's root."""
    try:
        return file.resolve()
    except (OSError, RuntimeError):
        return Path(file.anchor or "/")


def read_json(file: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelRefused(
            f"{name}/{file.name} is invalid JSON ({one_line(error)}): copy it again"
        ) from error
    if not isinstance(value, dict):
        raise ModelRefused(f"{name}/{file.name} is not a JSON object: copy it again")
    return value


def read_config(folder: Path, name: str) -> PreTrainedConfig:
    """Read the configuration of a supported decoder-only model that can be rolled back."""
    if not (folder / "config.json").is_file():
        raise ModelRefused(f"{name} has no config.json: give the folder of a whole model")
    reject_remote_code(folder, name)
    kind = read_json(folder / "config.json", name).get("model_type")
    if str(kind) not in CONFIG_MAPPING:
        raise ModelRefused(
            f"{name}/config.json names model_type {str(kind)[:64]!r}: "
            "choose a model that transformers knows"
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ImportError, StrictDataclassError, *MODEL_ERRORS) as error:
        raise ModelRefused(
            f"{name}/config.json does not fit model_type {kind} ({one_line(error)}): copy it again"
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelRefused(
            f"{name} ({config.model_type}) is not a causal language model: "
            "choose a decoder-only model"
        )
    kinds: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    check_config(config, kinds[0] if isinstance(kinds, tuple) else kinds, name)
    return config


def check_weights(folder: Path, name: str) -> None:
    """Raise ModelRefused unless all safetensors are complete and in the folder itself."""
    index = folder / INDEX_FILE
    if index.is_file():
        listed = read_index(index, name)
    elif (folder / "model.safetensors").is_file():
        listed = ["model.safetensors"]
    elif others := sorted(
        file.name
        for ending in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.gguf")
        for file in folder.glob(ending)
    ):
        raise ModelRefused(
            f"{name} has no safetensors, only {others[0]}: "
            "convert it where you trust it, with save_pretrained()"
        )
    else:
        raise ModelRefused(f"{name} has no model.safetensors: give the folder of a whole model")
    for file in listed:
        if Path(file).name != file or not (folder / file).is_file():
            raise ModelRefused(
                f"{name} has no weight file {file[:64]!r} although its index names it: "
                "copy it again"
            )
        try:
            with safe_open(folder / file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelRefused(
                f"{name}/{file} is not a whole safetensors file ({one_line(error)}): copy it again"
            ) from error


def read_index(index: Path, name: str) -> list[str]:
    """Return the names of the weight files in an index of shards."""
    try:
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted({str(file) for file in weights.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelRefused(
            f"{name}/{index.name} is not an index of weights: copy it again"
        ) from error


def check_loadable(folder: Path, name: str, config: PreTrainedConfig) -> None:
    """Raise ModelRefused unless the module can be made and its weights have the right shapes.

    It reads only the headers of the weight files.
    """
    try:
        read_weights(folder, name, config, torch.float32, torch.device("meta"))
    except ModelRefused as error:
        # Some architecture might need values while it is made: then loading decides.
        if not isinstance(error.__cause__, NotImplementedError):
            raise


def read_weights(
    folder: Path,
    name: str,
    config: PreTrainedConfig,
    dtype: torch.dtype | str,
    device: torch.device,
) -> Any:
    """Load the module with all of its weights; on the device "meta" without their values.

    transformers only warns about missing and misshapen weights and fills them with random numbers.
    """
    try:
        reader: Any = AutoModelForCausalLM
        safely: dict[str, Any] = {
            "use_safetensors": True,
            "trust_remote_code": False,
            "local_files_only": True,
        }
        if device.type == "meta":
            safely["device_map"] = "meta"
        with quiet_transformers():
            module, report = reader.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # the report has them
                **safely,
            )
        module.to(device)
    except (OSError, ImportError, StrictDataclassError, *MODEL_ERRORS) as error:
        raise ModelRefused(
            f"{name} cannot be loaded ({one_line(error)}): copy it again or choose another model"
        ) from error
    if missing := sorted(map(str, report["missing_keys"])):
        raise ModelRefused(
            f"{name} lacks {len(missing)} of its weights, {missing[0][:100]} among them: "
            "copy it again"
        )
    if misshapen := sorted(report["mismatched_keys"]):
        key, found, expected = misshapen[0]
        raise ModelRefused(
            f"{name} has {len(misshapen)} weights of other shapes than its config.json says, "
            f"{str(key)[:100]} of {list(found)} in place of {list(expected)} among them: "
            "copy it again"
        )
    return module
