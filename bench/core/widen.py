"""A small Llama model with the cost of a large one: real acceptance at a realistic cost ratio.

Widening adds channels, heads, neurons and layers whose outputs are multiplied by zero. Their
computation is real, and the model's function stays the same up to rounding, for three reasons:

- The added channels of the residual stream stay zero, so RMSNorm sees the same sum of squares over
  more channels: its weight is scaled by sqrt(old / new), its epsilon by old / new.
- Grouped key and value heads are repeated until each query head has its own, so any number of
  heads can be appended.
- A head, a neuron or a layer writes to the residual stream only through o_proj or down_proj, whose
  added entries are zero.

The added weights are bfloat16 values, as in nearly every published model, whatever the stored type.
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
WEIGHT_STD = 0.02  # standard deviation of the added weights
NOISE_COUNT = 1 << 20  # random values drawn, then repeated: billions would take minutes
WIDEN_VERSION = 2  # of the result of `widen`; part of the cache name


@dataclass(frozen=True, slots=True)
class WideShape:
    """The shape of a widened model.

    Heads keep the size of the source; `heads` defaults to as many as the hidden size holds.
    """

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
    """Return a new float32 model of this shape that computes the same function as `source`.

    `source` is unchanged. Raises InvalidRequest if any size is below the source's.
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
    """Fill one weight of the wide model in place.

    The source's weight goes into its corner. The rest is `noise`, or zero if noise would change the
    function.
    """
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
        tensor[: source.shape[0]] = 0.0  # the original rows read only the original channels
        tensor[: source.shape[0], : source.shape[1]] = source
    else:
        tensor[: source.shape[0]] = source


def widen_folder(folder: Path, shape: WideShape, dtype: str) -> Path:
    """Return the cached folder of the model in `folder` widened to this shape; write it if missing.

    The name contains source, shape and dtype. Raises ModelRefused if the source is not a Llama
    model, InvalidRequest for an unsuitable shape or dtype.
    """
    if dtype not in DTYPES:
        raise InvalidRequest(f"unknown dtype {dtype!r}: give one of {', '.join(DTYPES)}", "dtype")
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
    """Widen to SMALL_SHAPE; the argument is (folder, dtype), for `call_in_subprocess`."""
    folder, dtype = given
    return widen_folder(Path(folder), SMALL_SHAPE, dtype)


def cache_name(folder: Path, shape: WideShape, dtype: str) -> str:
    """Return a name that is equal for equal content: it hashes configuration, weights and shape."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelRefused(
            f"{folder}/config.json cannot be read: give the folder of a Llama model"
        ) from error
    if not isinstance(config, dict) or config.get("model_type") != "llama":
        raise ModelRefused(f"{folder} is not a Llama model: only that family can be widened")
    digest = hashlib.sha256(f"{WIDEN_VERSION} {shape} {dtype}".encode())
    files = sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")])
    if not any(file.suffix == ".safetensors" for file in files):
        raise ModelRefused(f"{folder} has no safetensors: give a complete model folder")
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return (
        f"{folder.resolve().name}-{shape.hidden}x{shape.layers}-{dtype}-{digest.hexdigest()[:12]}"
    )


def widen_head(folder: Path, target: Path) -> Path:
    """Return the cached folder of a trained head or S3D drafter padded to fit a widened target.

    `target` comes from `widen_folder`, applied to the target that the head was trained for. The
    added channels are zero and stay zero. The target of an S3D drafter must have as many key heads
    as query heads.
    """
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
    """Pad one trained tensor with zeros at the end.

    An adapter's pair has the shapes (rank, inner) and (outer, rank); the rank is kept.
    """
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
