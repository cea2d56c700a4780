"""A search for the subset of the target's layers that drafts best, on calibration text.

Draft & Verify (arXiv 2309.08168) and LayerSkip (2404.16710) draft with some of the target's own
layers. The search is greedy: it removes one layer after the other, each time the layer without
which the rest agrees most often with the whole target. The path covers every number of layers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runtime.config import ScheduleConfig
from runtime.core.errors import ModelRefused
from runtime.models.acceptance import RANKS
from runtime.models.base import ModelIdentity
from runtime.models.hf import MODEL_ERRORS
from runtime.sim.forecast import Setting, forecast
from runtime.sim.pair_profile import PairProfile
from training.teacher import Teacher

FORECAST_TOKENS = 200  # tokens of a forecast

Score = Callable[
    [Sequence[int]], float
]  # kept layers -> share of tokens on which they agree with the whole target


@dataclass(frozen=True, slots=True)
class Subset:
    """The kept layers, in rising order, and the share of tokens that they choose as the whole
    target does."""

    layers: tuple[int, ...]
    acceptance: float


def search_layers(
    count: int, score: Score, tell: Callable[[int], None] = lambda more: None
) -> list[Subset]:
    """Return subsets from `count` - 1 layers down to one; each is its predecessor minus a layer.

    `tell` is called after each trial.
    """
    kept, found = tuple(range(count)), []
    while len(kept) > 1:
        trials = []
        for left_out in kept:
            layers = tuple(layer for layer in kept if layer != left_out)
            trials.append(Subset(layers, score(layers)))
            tell(1)
        best = max(trials, key=lambda trial: trial.acceptance)
        found.append(best)
        kept = best.layers
    return found


def count_trials(count: int) -> int:
    """Return the number of subsets that a search evaluates."""
    return count * (count + 1) // 2 - 1


def forecast_speed_up(
    rates: Mapping[int, float], share: float, times: Mapping[int, float]
) -> float:
    """Return the planner's speed-up for layers that draft on a separate device while the target
    computes.

    rates  how often their first k guesses contain the target's choice, by k
    share  time of a draft pass relative to a target pass
    times  seconds of a target pass, by rows
    """
    draft = {rows: share * seconds for rows, seconds in times.items()}
    pair = PairProfile(target=dict(times), draft=draft, acceptance=dict(rates), rtt=0.0)
    return (
        forecast(pair, ScheduleConfig(), Setting(tokens=FORECAST_TOKENS)).tokens_per_second
        * times[1]
    )


def best_subset(promises: Mapping[Subset, float]) -> Subset:
    """Return the subset with the greatest speed-up."""
    return max(promises, key=lambda subset: promises[subset])


def as_json(identity: ModelIdentity, promises: Mapping[Subset, float]) -> dict[str, Any]:
    """Return the `layers` that `--draft layer-skip` reads, and how they were found."""

    def told(subset: Subset) -> dict[str, Any]:
        return {
            "layers": list(subset.layers),
            "acceptance": round(subset.acceptance, 4),
            "speed_up": round(promises[subset], 4),
        }

    others = [told(subset) for subset in promises]
    return {
        "method": "layer-skip",
        "target": asdict(identity),
        **told(best_subset(promises)),
        "others": others,
    }


def layers_of(teacher: Teacher) -> nn.ModuleList:
    """Return the target's layers. Raises ModelRefused if they cannot be found or there is only
    one."""
    found: Any = getattr(getattr(teacher.module, "model", None), "layers", None)
    if not isinstance(found, nn.ModuleList) or len(found) < 2:
        raise ModelRefused(
            f"model {teacher.model.name} has no layers to choose from in model.layers: "
            "choose a Llama-like target"
        )
    return found


@contextmanager
def keep_layers(teacher: Teacher, layers: Sequence[int]) -> Iterator[None]:
    """Remove the target's other layers inside the block."""
    whole = layers_of(teacher)
    teacher.module.model.layers = nn.ModuleList(whole[layer] for layer in layers)
    try:
        yield
    finally:
        teacher.module.model.layers = whole


def agreement_score(teacher: Teacher, texts: Sequence[Tensor]) -> Score:
    """Score kept layers by how often their most likely token is the whole target's.

    `texts` are batches (batch, context).
    """
    found = rank_rates(teacher, texts, (1,))
    return lambda layers: found(layers)[1]


def rank_rates(
    teacher: Teacher, texts: Sequence[Tensor], ranks: Sequence[int] = RANKS
) -> Callable[[Sequence[int]], dict[int, float]]:
    """Score kept layers by how often their first k guesses contain the whole target's choice, by k.

    `texts` are batches (batch, context).
    """
    wanted = [top_tokens(teacher, rows, 1) for rows in texts]

    def found(layers: Sequence[int]) -> dict[int, float]:
        with keep_layers(teacher, layers):
            right = torch.cat(
                [
                    top_tokens(teacher, rows, max(ranks)) == truth
                    for rows, truth in zip(texts, wanted, strict=True)
                ]
            )
        return {k: float(right[..., :k].any(-1).float().mean()) for k in ranks}

    return found


def pass_share(teacher: Teacher, layers: Sequence[int]) -> float:
    """Return the cost of a pass relative to the whole target's, by the weights of layers and
    unembedding."""
    unembedding = teacher.module.get_output_embeddings().weight.numel()
    sizes = [sum(weight.numel() for weight in layer.parameters()) for layer in layers_of(teacher)]
    return float((sum(sizes[layer] for layer in layers) + unembedding) / (sum(sizes) + unembedding))


def top_tokens(teacher: Teacher, rows: Tensor, most: int) -> Tensor:
    """Return the top tokens (batch, context, most), most likely first."""
    try:
        with torch.no_grad():
            found: Tensor = (
                teacher.module(rows.to(teacher.model.device), use_cache=False)
                .logits.topk(most)
                .indices
            )
        return found
    except MODEL_ERRORS as misfit:
        raise ModelRefused(
            f"model {teacher.model.name} does not run without some layers ({misfit}): choose "
            "another model"
        ) from misfit
