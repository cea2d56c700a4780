"""Writes a tiny Llama model as a GGUF file, as llama.cpp's converter would."""

import json
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.pair import SHIPPED

CONTEXT = 256
LAYERS, HEADS, KV_HEADS, HIDDEN, INNER = 2, 4, 2, 64, 96
EOS, EOT = 0, 7
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    vocabulary = json.loads((SHIPPED / "tokenizer.json").read_text())["model"]["vocab"]
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=CONTEXT,
            initializer_range=0.4,
            tie_word_embeddings=True,
        )
    )


def write_gguf(
    file: Path,
    model: LlamaForCausalLM | None = None,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str = "llama",
    layers: int = LAYERS,
    heads: int = HEADS,
    without: str = "",
) -> Path:
    """Write a model and the shipped tokenizer.

    `layers` and `heads` may differ from what is there; `without` names a tensor to leave out.
    """
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(heads)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    add_tokenizer(writer)
    for name, tensor in (model or tiny_llama()).state_dict().items():
        if (ggml := ggml_name(name)) is None or ggml == without:
            continue
        values = ggml_order(ggml, tensor.float().numpy())
        if values.ndim == 1 or kind is gguf.GGMLQuantizationType.F32:
            writer.add_tensor(ggml, values)
        else:
            writer.add_tensor(ggml, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    found = json.loads((SHIPPED / "tokenizer.json").read_text())
    tokens = sorted(found["model"]["vocab"], key=found["model"]["vocab"].get)
    special = {token["content"] for token in found["added_tokens"]}
    merges = found["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(EOS)
    writer.add_eos_token_id(EOS)
    writer.add_eot_token_id(EOT)
    writer.add_chat_template(TEMPLATE)


def ggml_name(name: str) -> str | None:
    """Return ggml's name of a tensor; None for the output layer, which is the embedding."""
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm"}
    if name in whole:
        return whole[name].removesuffix(".weight") + ".weight"
    if not name.startswith("model.layers."):
        return None
    number, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{number}.{NAMES[part]}.weight"


def ggml_order(name: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Interleave the halves of each head of queries and keys, as ggml's rotary positions want."""
    heads = HEADS if ".attn_q." in name else KV_HEADS if ".attn_k." in name else 0
    if not heads:
        return values
    rows, columns = values.shape
    halves = values.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))
