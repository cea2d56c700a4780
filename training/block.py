"""Training of a block drafter (DFlash, arXiv 2602.06036; DSpark, 2607.05147): each place is
distilled from the target's distribution there, given the true token before it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from runtime.models.block import Block, BlockShape, write_block
from training import eagle
from training.acceptance import HeldOutAcceptance
from training.eagle import LOOK_AHEAD
from training.eagle_run import EagleData, LayerMethod, train_layer
from training.features import Features, read_features
from training.frozen_kl import frozen_kl
from training.loop import Loss, low_precision
from training.progress import ProgressBar
from training.run import TrainingJob
from training.teacher import Teacher

# weight of each place relative to the one before, because later ones are reached less often
PLACE_DECAY = 0.8
ROOT_SHARE = 8  # one row in so many guesses the further places


def new_block(
    teacher: Teacher,
    layers: Sequence[int],
    intermediate: int,
    draft_tokens: Tensor,
    places: int,
    rank: int,
    seed: int,
) -> Block:
    """Create an untrained block layer. Raises ModelRefused as `new_eagle` does."""
    layer = eagle.layer_shape(teacher, layers, intermediate, len(draft_tokens))
    torch.manual_seed(seed)
    made = Block(teacher.hidden_size, BlockShape(layer, places, rank))
    eagle.initialize(made, draft_tokens)
    with torch.no_grad():
        made.markov_out.weight.zero_()
    return made


def block_states(
    module: Block, embeddings: Tensor, taps: Tensor, texts: Tensor, roots: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the states (batch, n - 1, d) of place 0 of all rows, and (batch, m, B - 1, d) of the
    further places after the rows `roots`.

    embeddings  (batch, n, d) of the tokens
    taps        (batch, n, T * d) of the same tokens
    texts       (batch, n), the number of each token's text; a text sees no other
    roots       (m,), below n - 1

    Place j of row i guesses token i + j + 2. It sees the true rows up to i, and, above place 0, the
    block's mask rows.
    """
    features = module.fuse(taps[:, :-1])
    seen = (texts[:, :-1, None] == texts[:, None, :-1]).tril()
    bias = torch.zeros(seen.shape, device=texts.device).masked_fill(~seen, -torch.inf)
    rows = torch.arange(1, len(texts[0]), device=texts.device)
    q, k, v = module.project(embeddings[:, 1:], features, rows)
    group = module.shape.heads // module.shape.kv_heads
    k, v = k.repeat_interleave(group, -3), v.repeat_interleave(group, -3)
    first = module.finish(features, eagle.attend(q, [(k, v)], bias[:, None]))
    masks = module.block_shape.places - 1
    given = features[:, roots, None].expand(-1, -1, masks, -1)
    after = roots[:, None] + 2 + torch.arange(masks, device=roots.device)
    q, own_k, own_v = module.project(module.mask_embed.expand_as(given), given, after)
    own_k, own_v = own_k.repeat_interleave(group, -3), own_v.repeat_interleave(group, -3)
    scale, bias = q.shape[-1] ** -0.5, bias[:, roots, None, None]
    true = torch.einsum("bmhqd,bhnd->bmhqn", q, k).float() * scale + bias
    shares = torch.cat([true, (q @ own_k.mT).float() * scale], dim=-1).softmax(-1).to(q.dtype)
    n = bias.shape[-1]
    attended = torch.einsum("bmhqn,bhnd->bmhqd", shares[..., :n], v) + shares[..., n:] @ own_v
    return first, module.finish(given, attended)


def place_rows(module: Block, state: Tensor, place: int, embeddings: Tensor) -> Tensor:
    """Return the rows (..., d) whose products with the unembedding are the logits of a place;
    `embeddings` (..., d) are of the tokens before it."""
    return module.rows_after(state, embeddings) if place else module.final_norm(state)


def distillation(
    teacher: Teacher, module: Block, known: Features, scales: Tensor, context: int
) -> Loss:
    """Return the forward KL from the target's distribution over the draft vocabulary, averaged over
    places with falling weights. It takes the starts of windows.

    All rows guess place 0; one in ROOT_SHARE, at random, guesses the further places too, which
    costs less and is the same on average.
    """
    device = teacher.model.device
    table = teacher.module.get_input_embeddings().weight.detach()
    unembedding = teacher.module.get_output_embeddings().weight.detach()[module.draft_tokens]
    sizes = scales.repeat_interleave(teacher.hidden_size).to(device)
    places = module.block_shape.places

    def loss(windows: Tensor, _: float) -> Tensor:
        seen = known.rows(windows[:, None] + torch.arange(context))
        tokens, texts = seen.tokens.to(device), seen.texts.to(device)
        rows = context - places - 1  # those whose guesses are all of known tokens
        roots = torch.randperm(rows)[: -(-rows // ROOT_SHARE)].sort().values.to(device)
        last = seen.last.to(device)
        with low_precision(device):
            embeddings = table[tokens].float()
            taps = seen.taps.to(device).float() / sizes
            first, after = block_states(module, embeddings, taps, texts, roots)
            total = torch.zeros((), device=device)
            for place in range(places):
                at = roots if place else torch.arange(context - LOOK_AHEAD, device=device)
                valid = texts[:, at] == texts[:, at + place + LOOK_AHEAD]
                before = (embeddings[:, at + place + 1])[valid]
                state = (after[:, :, place - 1] if place else first[:, : len(at)])[valid]
                guess = place_rows(module, state, place, before)
                truth = last[:, at + place + 1][valid]
                total = total + PLACE_DECAY**place * frozen_kl(guess, truth, unembedding)
        return total / sum(PLACE_DECAY**place for place in range(places))

    return loss


def block_guesser(teacher: Teacher, module: Block) -> Callable[[Sequence[int], int], Tensor]:
    """Return a function from a text and a first row to logits (places, rows, vocabulary) on the
    CPU, each given the true token before it. Tokens outside of the draft vocabulary have minus
    infinity."""
    device = teacher.model.device
    table = teacher.module.get_input_embeddings().weight
    unembedding = teacher.module.get_output_embeddings().weight[module.draft_tokens].float()
    places = module.block_shape.places

    def guess(text: Sequence[int], first: int) -> Tensor:
        with torch.no_grad():
            rows = torch.tensor([text], device=device)
            taps, _ = read_features(teacher.module, module.shape.layers, rows)
            roots = torch.arange(first, len(text) - 1, device=device)
            embeddings = table[rows].float()
            known, after = block_states(
                module, embeddings, taps.float(), torch.zeros_like(rows), roots
            )
            states = torch.cat([known[:, roots, None], after], dim=2)
            found = torch.full(
                (places, len(text) - first, teacher.model.vocabulary), -torch.inf, device=device
            )
            for place in range(places):
                before = embeddings[0, first + 1 + place :]
                state = states[0, : len(before), place]
                logits = F.linear(place_rows(module, state, place, before), unembedding)
                found[place][: len(logits)][:, module.draft_tokens] = logits
        return found.cpu()

    return guess


def train_block(
    order: TrainingJob, material: EagleData, work: Path, bar: ProgressBar
) -> dict[str, list[HeldOutAcceptance]]:
    """Train, measure and publish a block layer at `order.out`; return the acceptance by title."""
    teacher, asked = material.teacher, order.settings
    method = LayerMethod(
        lambda tokens: new_block(
            teacher,
            asked["layers"],
            asked["intermediate"],
            tokens,
            asked["places"],
            asked["rank"],
            order.seed,
        ),
        lambda module, known, scales: distillation(teacher, module, known, scales, order.context),
        lambda module: block_guesser(teacher, module),
        write_block,
    )
    return train_layer(order, material, method, work, bar)
