"""A small Llama model with the cost of a large one: real acceptance at a realistic cost ratio of target to draft.

Channels, heads, neurons and layers are added whose outputs are multiplied by zero. The work that they cause is real; the function stays the
same up to rounding. Three facts make that so:

- the added channels of the residual stream stay zero, so RMSNorm sees the same sum of squares over more channels: its weight is scaled by
  sqrt(old / new), its epsilon by old / new;
- grouped key and value heads are repeated until each query head has one of its own, so that any number of heads can be added behind them;
- a head, a neuron or a layer writes into the residual stream only through o_proj or down_proj, whose added entries are zero.

Like the weights of nearly every published model those that are added are in bfloat16, whatever type they are kept in.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights
from transformers.utils import logging

from runtime.core.errors import InvalidRequest, ModelRefused
from runtime.models.head_checkpoint import target_identity, write_checkpoint
from runtime.models.loader import DTYPES, load_tokenizer

CACHE = Path(__file__).parents[2] / "build" / "bench"
WEIGHT_STD = 0.02  # standard deviation of the weights that only cost time
NOISE_COUNT = 1 << 20  # of them drawn, then repeated: billions would take minutes
WIDEN_VERSION = 2  # of what `widen` computes; part of the name in the cache


@dataclass(frozen=True, slots=True)
class WideShape:
    """Heads keep the size that they have in the source; without a number there are as many as the hidden size holds."""

    hidden: int
    layers: int
    ffn: int
    heads: int | None = None


SMALL_SHAPE = WideShape(hidden=768, layers=12, ffn=2048)  # 88M parameters for the target that ships


def head_size(config: LlamaConfig) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def widen(
    source: LlamaForCausalLM, hidden: int, layers: int, ffn: int, heads: int, seed: int = 0
) -> LlamaForCausalLM:
    """A new float32 model of this shape with the function of `source`, which is left as it is.

    Raises InvalidRequest where the shape is smaller than the source's anywhere.
    """
    old = source.config
    check_shape(old, hidden, layers, ffn, heads)
    size, ratio = head_size(old), old.hidden_size / hidden
    group = old.num_attention_heads // old.num_key_value_heads
    changes = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": size,
        "rms_norm_eps": old.rms_norm_eps * ratio,
        "dtype": "float32",
    }
    kept = {
        key: value
        for key, value in old.to_dict().items()
        if key not in ("architectures", "transformers_version")
    }
    with no_init_weights():
        model = LlamaForCausalLM(LlamaConfig(**kept | changes)).eval()
    model.tie_weights()
    model.generation_config = source.generation_config
    noise = (
        (torch.randn(NOISE_COUNT, generator=torch.Generator().manual_seed(seed)) * WEIGHT_STD)
        .bfloat16()
        .float()
    )

    def ungroup(rows: Tensor) -> Tensor:
        return rows.view(-1, size, *rows.shape[1:]).repeat_interleave(group, 0).flatten(0, 1)

    given = {
        name: tensor.detach().to("cpu", torch.float32)
        for name, tensor in source.state_dict().items()
    }
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            fill_weight(tensor, name, given, ratio, ungroup, noise)
    return model


def check_shape(old: LlamaConfig, hidden: int, layers: int, ffn: int, heads: int) -> None:
    pairs = {
        "hidden": (hidden, old.hidden_size),
        "layers": (layers, old.num_hidden_layers),
        "ffn": (ffn, old.intermediate_size),
        "heads": (heads, old.num_attention_heads),
    }
    for name, (given, least) in pairs.items():
        if given < least:
            raise InvalidRequest(
                f"{name} {given} is below the source's {least}: give at least that", name
            )


def fill_weight(
    tensor: Tensor,
    name: str,
    given: dict[str, Tensor],
    ratio: float,
    ungroup: Callable[[Tensor], Tensor],
    noise: Tensor,
) -> None:
    """One weight of the wide model, in place: the source's in its corner, `noise` in the rest, but zero where that would be heard."""
    source = given.get(name)
    writes = name.endswith(
        (
            "o_proj.weight",
            "o_proj.bias",
            "down_proj.weight",
            "down_proj.bias",
            "embed_tokens.weight",
            "lm_head.weight",
        )
    )
    if "norm" in name:
        tensor.fill_(1.0)
    elif writes:
        tensor.zero_()
    else:
        for part in tensor.view(-1).split(len(noise)):
            part.copy_(noise[: len(part)])
    if source is None:
        return
    if "norm" in name:
        source = source * ratio**0.5
    elif "k_proj" in name or "v_proj" in name:
        source = ungroup(source)
    if source.ndim == 2:
        tensor[: source.shape[0]] = (
            0.0  # the rows that carry the function see the old channels only
        )
        tensor[: source.shape[0], : source.shape[1]] = source
    else:
        tensor[: source.shape[0]] = source


def widen_folder(folder: Path, shape: WideShape, dtype: str) -> Path:
    """The folder, in the cache, of the model in `folder` given this shape: written where it is not there, named by source, shape and dtype.

    Raises ModelRefused where the source is no Llama model, InvalidRequest for a shape or dtype that does not fit it.
    """
    if dtype not in DTYPES:
        raise InvalidRequest(
            f"dtype {dtype!r} is not known: give one of {', '.join(DTYPES)}", "dtype"
        )
    done = CACHE / cache_name(folder, shape, dtype)
    if done.is_dir():
        return done
    logging.disable_progress_bar()
    source = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    heads = shape.heads or max(
        shape.hidden // head_size(source.config), source.config.num_attention_heads
    )
    model = widen(source, shape.hidden, shape.layers, shape.ffn, heads).to(DTYPES[dtype])
    partial = done.with_name(done.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    for file in folder.glob("*token*.json"):
        shutil.copy(file, partial)
    partial.rename(done)
    return done


def widen_to_small(given: tuple[str, str]) -> Path:
    """`widened` to SMALL, by folder and dtype; for bench.core.subprocess_call."""
    folder, dtype = given
    return widen_folder(Path(folder), SMALL_SHAPE, dtype)


def cache_name(folder: Path, shape: WideShape, dtype: str) -> str:
    """Equal for equal content: a hash of the configuration, the weights and what is made of them."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelRefused(
            f"{folder}/config.json cannot be read: give the folder of a Llama model"
        ) from error
    if not isinstance(config, dict) or config.get("model_type") != "llama":
        raise ModelRefused(f"{folder} is no Llama model: only that family can be widened")
    digest = hashlib.sha256(f"{WIDEN_VERSION} {shape} {dtype}".encode())
    files = sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")])
    if not any(file.suffix == ".safetensors" for file in files):
        raise ModelRefused(f"{folder} has no safetensors: give the folder of a whole model")
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return (
        f"{folder.resolve().name}-{shape.hidden}x{shape.layers}-{dtype}-{digest.hexdigest()[:12]}"
    )


def widen_head(folder: Path, target: Path) -> Path:
    """The folder, in the cache, of a trained head or S3D made to fit `target`, which `widened` has made of the target that it was trained
    for: the channels that were added are zero, and stay so. Of an S3D's target, keys have as many heads as queries."""
    config, tensors = (
        json.loads((folder / "config.json").read_text("utf-8")),
        load_file(folder / "model.safetensors"),
    )
    shape = AutoConfig.from_pretrained(target)
    wide = {name: pad_tensor(name, tensor, shape) for name, tensor in tensors.items()}
    done = CACHE / f"{folder.name}-{target.name}"
    identity = target_identity(AutoConfig.from_pretrained(target), load_tokenizer(str(target)))
    write_checkpoint(done, config["method"], identity, config["settings"], wide)
    return done


def pad_tensor(name: str, tensor: Tensor, shape: LlamaConfig) -> Tensor:
    """One tensor of something trained, with zeros behind. Of an adapter's pair, (rank, inner) and (outer, rank), the rank stays."""
    heads, ffn = shape.num_attention_heads * head_size(shape), shape.intermediate_size
    reads = {"o_proj": heads, "down_proj": ffn}
    writes = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), heads),
        **dict.fromkeys(("gate_proj", "up_proj"), ffn),
    }
    *_, part, side = f".{name}".split(".")
    if side == "down":
        sizes = (tensor.shape[0], reads.get(part, shape.hidden_size))
    elif side == "up":
        sizes = (writes.get(part, shape.hidden_size), tensor.shape[1])
    elif side == "mask_embed":
        sizes = (tensor.shape[0], shape.hidden_size)
    else:
        sizes = (shape.hidden_size,) * tensor.ndim
    return F.pad(
        tensor,
        [
            count
            for size, old in zip(reversed(sizes), reversed(tensor.shape), strict=True)
            for count in (0, size - old)
        ],
    )
