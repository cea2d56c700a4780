"""Training of EAGLE-3's draft layer (arXiv 2503.01840): distilled from the target's distribution,
unrolled over its own states (training-time test)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from runtime.core.errors import ModelRefused
from runtime.models.eagle import Eagle, EagleShape
from training.features import Features, read_features
from training.frozen_kl import frozen_kl
from training.loop import Batches, Loss, low_precision
from training.teacher import Teacher

# weight of each unrolled step relative to the one before, as in the paper
STEP_DECAY = 0.8
LOOK_AHEAD = 2  # row i guesses token i + 2
LATER_SHARE = 4  # the steps after the first go on from one row in so many


def new_eagle(
    teacher: Teacher, layers: Sequence[int], intermediate: int, draft_tokens: Tensor, seed: int
) -> Eagle:
    """Create an untrained draft layer with the attention of the target's layers.

    Raises ModelRefused as `layer_shape` does.
    """
    torch.manual_seed(seed)
    made = Eagle(teacher.hidden_size, layer_shape(teacher, layers, intermediate, len(draft_tokens)))
    initialize(made, draft_tokens)
    return made


def layer_shape(
    teacher: Teacher, layers: Sequence[int], intermediate: int, draft_vocabulary: int
) -> EagleShape:
    """Return the shape of a draft layer with the attention of the target's layers.

    Raises ModelRefused for a target whose attention is not described as Llama's is.
    """
    config = teacher.module.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        raise ModelRefused(
            f"model {teacher.model.name} ({config.model_type}) does not tell its attention heads: "
            "train medusa for it"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    return EagleShape(
        tuple(layers),
        intermediate,
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        float(rope.get("rope_theta", 1e4)),
        float(getattr(config, "rms_norm_eps", 1e-5)),
        draft_vocabulary,
    )


def initialize(module: Eagle, draft_tokens: Tensor) -> None:
    """Set the draft tokens, and let the layer begin as the identity."""
    module.draft_tokens.copy_(draft_tokens)
    with torch.no_grad():
        module.o.weight.zero_()
        module.down.weight.zero_()


def default_layers(depth: int) -> list[int]:
    """Return a low, a middle and a high layer."""
    return sorted({min(2, depth), depth // 2, max(0, depth - 2)})


def frequent_tokens(tokens: Tensor, count: int) -> Tensor:
    """Return the `count` most frequent tokens, or all that occur, in rising order."""
    found, often = tokens.unique(return_counts=True)
    best: Tensor = found[often.argsort(descending=True, stable=True)[:count]].sort().values
    return best


def tap_scales(taps: Tensor, layers: int) -> Tensor:
    """Return the usual size (layers,) of the states of each layer.

    It is a median, because the states of a text's first token are larger by orders of magnitude.
    """
    some = taps[:: max(1, len(taps) // 4096)].unflatten(-1, (layers, -1)).float()
    scales: Tensor = some.square().mean(-1).sqrt().median(0).values
    return scales


def scale_taps(module: Eagle, scales: Tensor) -> None:
    """Make `fuse`, which was trained on states divided by their scales, fit the states
    themselves."""
    with torch.no_grad():
        module.fuse.weight.view(len(module.fuse.weight), len(scales), -1).div_(scales[:, None])


def window_starts(total: int, context: int, batch: int, seed: int) -> Batches:
    """Return a function from a step to the starts (batch,) of its windows of `context` tokens.

    An epoch cuts all tokens into windows at another offset, in another order.
    """
    count = max(1, total // context - 1)

    def starts(step: int) -> Tensor:
        found = []
        for number in range(step * batch, (step + 1) * batch):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number // count)
            offset = int(torch.randint(max(1, total - count * context), (), generator=generator))
            order = torch.randperm(count, generator=generator)
            found.append(offset + int(order[number % count]) * context)
        return torch.tensor(found)

    return starts


def unroll(
    module: Eagle, embeddings: Tensor, taps: Tensor, texts: Tensor, starts: Tensor, steps: int
) -> list[Tensor]:
    """Return the states of each unrolled step: (batch, n - 1, d) of the first, which has all rows,
    and (batch, m, d) of the later ones, which go on from the rows `starts`.

    embeddings  (batch, n, d) of the tokens
    taps        (batch, n, T * d) of the same tokens
    texts       (batch, n), the number of each token's text; a text sees no other
    starts      (m,), below n - steps

    Row i of step j guesses token i + j + 2 of what was known at token i + 1: it sees the true rows
    up to i, and the rows i of the steps 1 to j, which were fed with the module's own states.
    """
    rows, features = torch.arange(len(texts[0]) - 1, device=texts.device), module.fuse(taps[:, :-1])
    seen = (texts[:, :-1, None] == texts[:, None, :-1]).tril()
    bias = torch.zeros(seen.shape, device=texts.device).masked_fill(~seen, -torch.inf)[:, None]
    group = module.shape.heads // module.shape.kv_heads
    states: list[Tensor] = []
    kept: list[tuple[Tensor, Tensor]] = []
    for step in range(steps):
        if step:
            features = states[0][:, starts] if step == 1 else states[-1]
            rows = starts
        at = rows + 1 + step
        q, k, v = module.project(embeddings[:, at], features, at)
        kept.append((k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
        states.append(module.finish(features, attend(q, kept, bias[:, :, rows])))
    return states


def attend(q: Tensor, kept: Sequence[tuple[Tensor, Tensor]], bias: Tensor) -> Tensor:
    """Return the attention of rows (batch, heads, m, head_dim) over all rows of the first step as
    far as `bias` (batch, 1, m, n) allows, and over their own row of each later step."""
    scale = q.shape[3] ** -0.5
    (first_keys, first_values), later = kept[0], kept[1:]
    scores = [(q @ first_keys.mT).float() * scale + bias]
    scores += [(q * k).sum(-1, keepdim=True).float() * scale for k, _ in later]
    shares = torch.cat(scores, dim=-1).softmax(-1).to(q.dtype)
    found = shares[..., : bias.shape[-1]] @ first_values
    for number, (_, v) in enumerate(later, start=bias.shape[-1]):
        found = found + shares[..., number : number + 1] * v
    return found


def distillation(
    teacher: Teacher, module: Eagle, known: Features, scales: Tensor, context: int, steps: int
) -> Loss:
    """Return the forward KL from the target's distribution over the draft vocabulary, averaged over
    unrolled steps with falling weights. It takes the starts of windows.

    Steps after the first go on from a random quarter of the rows, which costs less and is the same
    on average.
    """
    device = teacher.model.device
    table = teacher.module.get_input_embeddings().weight.detach()
    unembedding = teacher.module.get_output_embeddings().weight.detach()[module.draft_tokens]
    sizes = scales.repeat_interleave(teacher.hidden_size).to(device)

    def loss(windows: Tensor, _: float) -> Tensor:
        seen = known.rows(windows[:, None] + torch.arange(context))
        tokens, texts = seen.tokens.to(device), seen.texts.to(device)
        rows = context - steps - 1  # those whose guesses are all of known tokens
        starts = torch.randperm(rows)[: -(-rows // LATER_SHARE)].sort().values.to(device)
        last = seen.last.to(device)
        with low_precision(device):
            taps = seen.taps.to(device).float() / sizes
            states = unroll(module, table[tokens].float(), taps, texts, starts, steps)
            total = torch.zeros((), device=device)
            for step, state in enumerate(states):
                at = starts if step else torch.arange(context - LOOK_AHEAD, device=device)
                valid = texts[:, at] == texts[:, at + step + LOOK_AHEAD]
                guess = module.final_norm(state[:, : len(at)][valid])
                truth = last[:, at + step + 1][valid]
                total = total + STEP_DECAY**step * frozen_kl(guess, truth, unembedding)
        return total / sum(STEP_DECAY**step for step in range(steps))

    return loss


def eagle_guesser(
    teacher: Teacher, module: Eagle, steps: int
) -> Callable[[Sequence[int], int], Tensor]:
    """Return a function from a text and a first row to logits (steps, rows, vocabulary) on the
    CPU. Tokens outside of the draft vocabulary have minus infinity."""
    device = teacher.model.device
    table = teacher.module.get_input_embeddings().weight
    unembedding = teacher.module.get_output_embeddings().weight[module.draft_tokens].float()

    def guess(text: Sequence[int], first: int) -> Tensor:
        with torch.no_grad():
            rows = torch.tensor([text], device=device)
            taps, _ = read_features(teacher.module, module.shape.layers, rows)
            starts = torch.arange(len(text) - steps - 1, device=device)
            states = unroll(
                module, table[rows].float(), taps.float(), torch.zeros_like(rows), starts, steps
            )
            found = torch.full(
                (steps, len(text) - first, teacher.model.vocabulary), -torch.inf, device=device
            )
            for step, state in enumerate(states):
                logits = module.logits(state[0, first:], unembedding)
                found[step][: len(logits)][:, module.draft_tokens] = logits
        return found.cpu()

    return guess
