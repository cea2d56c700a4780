"""Writes a tiny target and draft to disk, for tests that start real processes."""

import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.paths import ROOT

SHIPPED = ROOT / "models" / "target"


def save_model(folder: Path, seed: int = 0, context: int = 4096, **changes: int) -> Path:
    """A Hugging Face folder of a random Llama model whose greedy output is varied."""
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "vocab_size": 4096,
    } | changes
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            **shape,
            max_position_embeddings=context,
            initializer_range=0.4,
            eos_token_id=0,
            bos_token_id=0,
        )
    )
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / name, folder)
