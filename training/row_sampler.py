"""Samples many texts at once with a transformers model: one token for each row in each pass.

Every row has its own text, position and temperature, and starts another text when one ends, so that
no row waits for the longest. Given tokens, such as a prompt, pass one by one like sampled ones. For
training data only: the runtime serves users.
"""

from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, Cache, PreTrainedModel

BLOCK = 64  # the cache grows by so many tokens, and a token is looked for in so many
ATTENTION = "outrider_rows"


class Text(Protocol):
    """A text in the making: `tokens` begins with what is given."""

    tokens: list[int]
    temperature: float

    def add(self, token: int) -> bool:
        """Append a sampled token, and further given ones if they follow; return whether the text
        goes on."""


AnyText = TypeVar("AnyText", bound=Text)


class RowCache(Cache):
    """Keys and values (rows, kv_heads, length, head_dim) of each layer.

    All rows write at the same place, that of the pass; what their earlier texts have written is
    masked.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.place = 0
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        return (self.place // BLOCK + 1) * BLOCK

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        kept = self.kept.get(layer, (keys[:, :, :0], values[:, :, :0]))
        if kept[0].shape[2] < self.length:
            room = keys.new_zeros(*keys.shape[:2], BLOCK, keys.shape[3])
            kept = (torch.cat([kept[0], room], dim=2), torch.cat([kept[1], room], dim=2))
            self.kept[layer] = kept
        for store, new in zip(kept, (keys, values), strict=True):
            store[:, :, self.place] = new[:, :, 0]
        return kept


def attend(
    _module: Any,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return the attention of one query for each row; the heads of a group share their keys."""
    rows, heads, length, size = keys.shape
    grouped = queries.reshape(rows * heads, -1, size)
    scores = torch.bmm(grouped, keys.view(rows * heads, length, size).mT)
    scores = scores.view(rows, heads, -1, length).float() * (scaling or size**-0.5)
    shares = scores.add_(mask).softmax(-1).to(values.dtype).view(rows * heads, -1, length)
    found = torch.bmm(shares, values.view(rows * heads, length, size))
    return found.view(rows, 1, -1, size), None


AttentionInterface.register(ATTENTION, attend)


def write_texts(
    module: PreTrainedModel, texts: Iterator[AnyText], rows: int, passes: int, seed: int
) -> list[AnyText]:
    """Return the texts that ended within `passes` passes, and then the unfinished ones.

    The module's attention is replaced meanwhile.
    """
    before = module.config._attn_implementation
    module.set_attn_implementation(ATTENTION)
    generator = torch.Generator(module.device).manual_seed(seed)
    cache, done = RowCache(), list[AnyText]()
    current, begun = [next(texts) for _ in range(rows)], [0] * rows
    try:
        for place in range(passes):
            tokens = [
                text.tokens[place - start] for text, start in zip(current, begun, strict=True)
            ]
            cache.place = place
            logits = run_pass(module, cache, tokens, begun)
            chosen = sample(logits, [text.temperature for text in current], generator)
            for row, text in enumerate(current):
                given = place + 1 - begun[row] < len(text.tokens)
                if not given and not text.add(chosen[row]):
                    done.append(text)
                    current[row], begun[row] = next(texts), place + 1
    finally:
        module.set_attn_implementation(before)
    return done + current


def run_pass(module: Any, cache: RowCache, tokens: list[int], begun: list[int]) -> Tensor:
    """Return logits (rows, vocabulary) after one token for each row, whose texts began in the
    passes `begun`."""
    device = module.device
    start, place = torch.tensor(begun, device=device)[:, None], torch.arange(cache.length)[None]
    place = place.to(device)
    unseen = (place < start) | (place > cache.place)
    mask = torch.zeros(unseen.shape, device=device).masked_fill(unseen, -torch.inf)
    with torch.inference_mode():
        logits: Tensor = module(
            torch.tensor(tokens, device=device)[:, None],
            position_ids=cache.place - start,
            attention_mask=mask[:, None, None],
            past_key_values=cache,
            use_cache=True,
        ).logits
    return logits[:, 0]


def sample(logits: Tensor, temperatures: list[float], generator: torch.Generator) -> list[int]:
    """Return a token for each row of logits (rows, vocabulary), the best one at temperature 0."""
    heat = torch.tensor(temperatures, device=logits.device)
    greedy = heat == 0
    shares = (logits.float() / heat.clamp_min(1e-3)[:, None]).softmax(-1)
    drawn = torch.rand(len(logits), generator=generator, device=logits.device)
    chosen = pick(shares, drawn)
    chosen[greedy] = logits[greedy].argmax(-1)
    found: list[int] = chosen.tolist()
    return found


def pick(shares: Tensor, drawn: Tensor) -> Tensor:
    """Return for each row of shares (rows, n) the place (rows,) at which their running sum passes
    the drawn part (rows,) of the whole.

    It looks for a block first and then within the block, which saves most of the running sum.
    """
    blocks = F.pad(shares, (0, -shares.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    sums = blocks.sum(-1).cumsum(-1)
    wanted = drawn[:, None] * sums[:, -1:]
    block = torch.searchsorted(sums, wanted, right=True).clamp_max(sums.shape[1] - 1)
    before = F.pad(sums, (1, 0)).gather(1, block)
    inner = blocks[torch.arange(len(shares)), block[:, 0]].cumsum(-1)
    place = torch.searchsorted(inner, wanted - before, right=True).clamp_max(BLOCK - 1)
    return (block * BLOCK + place)[:, 0].clamp_max(shares.shape[1] - 1)
