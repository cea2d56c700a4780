"""Which of the target's layers make the best drafter: a search over skipped layers on calibration text.

Draft & Verify (arXiv 2309.08168) and LayerSkip (2404.16710) draft with some of the target's own layers. The search takes away, one after
the other, the layer without which the rest still says most often what the whole target says: a greedy path through all numbers of layers.
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

FORECAST_TOKENS = 200  # of a forecast

Score = Callable[
    [Sequence[int]], float
]  # layers that are kept -> share of tokens on which they agree with all


@dataclass(frozen=True, slots=True)
class Subset:
    """layers: numbers of those kept, rising. acceptance: share of tokens that they choose as the whole target does."""

    layers: tuple[int, ...]
    acceptance: float


def search_layers(
    count: int, score: Score, tell: Callable[[int], None] = lambda more: None
) -> list[Subset]:
    """From all of `count` layers but one down to a single one; each is its predecessor less a layer. `tell` hears of each trial."""
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
    """How many subsets a search looks at."""
    return count * (count + 1) // 2 - 1


def forecast_speed_up(
    rates: Mapping[int, float], share: float, times: Mapping[int, float]
) -> float:
    """What the planner expects of layers that draft on a device of their own while the target computes, over plain decoding.

    rates  how often their first k guesses hold the target's choice, by k
    share  of the time of a pass of the target
    times  seconds of a pass of the target, by rows
    """
    draft = {rows: share * seconds for rows, seconds in times.items()}
    pair = PairProfile(target=dict(times), draft=draft, acceptance=dict(rates), rtt=0.0)
    return (
        forecast(pair, ScheduleConfig(), Setting(tokens=FORECAST_TOKENS)).tokens_per_second
        * times[1]
    )


def best_subset(promises: Mapping[Subset, float]) -> Subset:
    """That with the greatest speed-up."""
    return max(promises, key=lambda subset: promises[subset])


def as_json(identity: ModelIdentity, promises: Mapping[Subset, float]) -> dict[str, Any]:
    """What `--draft layer-skip` reads, `layers`, and how it was found."""

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
    """Raises ModelRefused where they are not to be found, or there is one alone."""
    found: Any = getattr(getattr(teacher.module, "model", None), "layers", None)
    if not isinstance(found, nn.ModuleList) or len(found) < 2:
        raise ModelRefused(
            f"model {teacher.model.name} has no layers in model.layers to choose from: choose a target built as Llama is"
        )
    return found


@contextmanager
def keep_layers(teacher: Teacher, layers: Sequence[int]) -> Iterator[None]:
    """The target without its other layers, for as long as the block lasts."""
    whole = layers_of(teacher)
    teacher.module.model.layers = nn.ModuleList(whole[layer] for layer in layers)
    try:
        yield
    finally:
        teacher.module.model.layers = whole


def agreement_score(teacher: Teacher, texts: Sequence[Tensor]) -> Score:
    """On texts (batch, context) each: how often the kept layers' most likely token is the whole target's."""
    found = rank_rates(teacher, texts, (1,))
    return lambda layers: found(layers)[1]


def rank_rates(
    teacher: Teacher, texts: Sequence[Tensor], ranks: Sequence[int] = RANKS
) -> Callable[[Sequence[int]], dict[int, float]]:
    """On texts (batch, context) each: how often the kept layers' first k guesses hold the whole target's choice, by k."""
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
    """Share of a pass of the whole target, by the weights that are read: the layers and the unembedding."""
    unembedding = teacher.module.get_output_embeddings().weight.numel()
    sizes = [sum(weight.numel() for weight in layer.parameters()) for layer in layers_of(teacher)]
    return float((sum(sizes[layer] for layer in layers) + unembedding) / (sum(sizes) + unembedding))


def top_tokens(teacher: Teacher, rows: Tensor, most: int) -> Tensor:
    """(batch, context, most), most likely first."""
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
            f"model {teacher.model.name} does not run without some of its layers ({misfit}): choose another"
        ) from misfit
