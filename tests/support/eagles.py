"""Makes an untrained EAGLE layer for a tiny target, and features of the target's texts."""

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from runtime.core.features import FeatureRows
from runtime.drafters.eagle import EagleDrafter, build
from runtime.models.eagle import Eagle, EagleShape, write_eagle
from runtime.models.head_checkpoint import target_identity
from runtime.models.loader import load_model, load_tokenizer
from tests.support.masks import ingredients
from tests.support.pair import save_model

SHAPE = EagleShape(
    layers=(0, 1, 3),
    intermediate=48,
    heads=4,
    kv_heads=2,
    head_dim=8,
    rope_theta=10000.0,
    eps=1e-5,
    draft_vocabulary=0,
)


class Tiny(NamedTuple):
    """Folders of a target and of an EAGLE for it; the target's module and the EAGLE as stored."""

    target: Path
    folder: Path
    module: Any
    eagle: Eagle


@cache
def tiny(vocabulary: int = 4096, context: int = 4096) -> Tiny:
    root = Path(tempfile.mkdtemp(prefix="outrider-tests-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    target = save_model(
        root / "target", num_hidden_layers=3, vocab_size=vocabulary, context=context
    )
    module: Any = load_model(str(target), step="generic").module
    torch.manual_seed(1)
    guessed = vocabulary // 2  # every second token
    eagle = Eagle(32, replace(SHAPE, draft_vocabulary=guessed))
    eagle.draft_tokens = torch.arange(guessed) * 2
    with torch.no_grad():
        for parameter in eagle.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.3)
    eagle = eagle.bfloat16()
    identity = target_identity(module.config, load_tokenizer(str(target)))
    write_eagle(root / "eagle", eagle, identity)
    return Tiny(target, root / "eagle", module, eagle.float().eval())


def drafter(found: Tiny) -> EagleDrafter:
    return build(ingredients(found.target, found.folder))


def features_of(found: Tiny, tokens: Sequence[int], start: int = 0) -> FeatureRows:
    """What a target sends for this text: rows from `start` up to the last token but one."""
    with torch.inference_mode():
        states = found.module(
            torch.tensor([list(tokens[:-1])]), use_cache=False, output_hidden_states=True
        ).hidden_states
    # The last of transformers' states has passed the final norm.
    inputs = torch.cat([layer_input(found, states, layer) for layer in SHAPE.layers], dim=-1)
    bits = inputs[start:].bfloat16().view(torch.int16).numpy().view(np.uint16)
    return FeatureRows(start, bits)


def layer_input(found: Tiny, states: Any, layer: int) -> torch.Tensor:
    if layer < len(states) - 1:
        row: torch.Tensor = states[layer][0]
        return row
    assert layer == len(states) - 1
    last: Any = found.module.model.layers[-1]
    positions = torch.arange(states[0].shape[1])[None]
    with torch.inference_mode():
        output = last(
            states[-2],
            attention_mask=causal_mask(states[0].shape[1]),
            position_embeddings=found.module.model.rotary_emb(states[-2], positions),
        )
    rows: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return rows.reshape(-1, rows.shape[-1])


def causal_mask(rows: int) -> torch.Tensor:
    return torch.full((rows, rows), -torch.inf).triu(1)[None, None]


def guessable(found: Tiny, tokens: Sequence[int]) -> torch.Tensor:
    """Returns the draft vocabulary, and then the other tokens of the text."""
    common = found.eagle.draft_tokens.tolist()
    return torch.tensor([*common, *sorted(set(tokens) - set(common))])


def straight(
    found: Tiny, features: FeatureRows, tokens: Sequence[int], path: Sequence[int]
) -> torch.Tensor:
    """Returns logits of the guessable tokens after the text and a path of guesses, by the module
    alone.

    Every token has a row but those before the features; a guess's feature is its parent's state.
    """
    eagle, table = found.eagle, found.module.get_input_embeddings().weight
    unembedding = found.module.get_output_embeddings().weight[guessable(found, tokens)]
    first = features.start + 1
    text = [*tokens, *path]
    true = torch.from_numpy(features.rows.view(np.int16)).view(torch.bfloat16).float()
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    state = torch.empty(0)
    with torch.inference_mode():
        fused = eagle.fuse(true)
        for position in range(first, len(text)):
            at = position - first
            feature = fused[at : at + 1] if at < len(fused) else state
            q, k, v = eagle.project(table[text[position]][None], feature, torch.tensor([position]))
            keys.append(k)
            values.append(v)
            attended = torch.nn.functional.scaled_dot_product_attention(
                q[None], torch.cat(keys, 1)[None], torch.cat(values, 1)[None], enable_gqa=True
            )[0]
            state = eagle.finish(feature, attended)
        logits: torch.Tensor = eagle.logits(state, unembedding)[0]
    return logits


def trained(found: Tiny, texts: torch.Tensor, steps: int = 100) -> Tiny:
    """An EAGLE that knows these texts of the target, int64 (texts, tokens), from its features."""
    features = torch.stack(
        [
            torch.from_numpy(features_of(found, text).rows.view(np.int16)).view(torch.bfloat16)
            for text in texts.tolist()
        ]
    )[:, :-1].float()
    table, unembedding = (
        layer.weight.detach().clone()
        for layer in (
            found.module.get_input_embeddings(),
            found.module.get_output_embeddings(),
        )
    )
    torch.manual_seed(0)
    eagle = Eagle(32, replace(SHAPE, draft_vocabulary=len(table)))
    optimizer = torch.optim.AdamW(eagle.parameters(), 5e-3)
    for _ in range(steps):
        fused = eagle.fuse(features)
        places = torch.arange(1, features.shape[1] + 1)
        q, k, v = eagle.project(table[texts[:, 1:-1]], fused, places)
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        logits = eagle.logits(eagle.finish(fused, attended), unembedding)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), texts[:, 2:].flatten()).backward()
        optimizer.step()
    folder = found.folder.with_name("trained")
    identity = target_identity(found.module.config, load_tokenizer(str(found.target)))
    write_eagle(folder, eagle, identity)
    return Tiny(found.target, folder, found.module, eagle.bfloat16().float().eval())


def greedy_texts(found: Tiny, count: int, tokens: int) -> torch.Tensor:
    """Random beginnings of 8 tokens, continued by the target."""
    vocabulary = found.module.config.vocab_size
    texts = torch.from_numpy(np.random.default_rng(0).integers(0, vocabulary, (count, 8)))
    with torch.no_grad():
        while texts.shape[1] < tokens:
            chosen = found.module(texts).logits[:, -1:].argmax(-1)
            texts = torch.cat([texts, chosen], dim=1)
    return texts
