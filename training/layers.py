"""Which of the target's layers make the best drafter: a search over skipped layers on calibration text.

Draft & Verify (arXiv 2309.08168) and LayerSkip (2404.16710) draft with some of the target's own layers. The search takes away, one after
the other, the layer without which the rest still says most often what the whole target says: a greedy path through all numbers of layers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runtime.errors import ModelRefused
from runtime.heads.base import Identity
from runtime.models.hf import MISFITS
from training.teacher import Teacher

LONGEST = 16  # tokens that a chain of guesses may have

Score = Callable[[Sequence[int]], float]  # layers that are kept -> share of tokens on which they agree with all


@dataclass(frozen=True, slots=True)
class Subset:
    """layers: numbers of those kept, rising. acceptance: share of tokens that they choose as the whole target does."""

    layers: tuple[int, ...]
    acceptance: float


def search(count: int, score: Score, tell: Callable[[int], None] = lambda more: None) -> list[Subset]:
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


def trials(count: int) -> int:
    """How many subsets a search looks at."""
    return count * (count + 1) // 2 - 1


def speed_up(acceptance: float, cost: float) -> tuple[float, int]:
    """Of drafting chains, at `cost` target passes a token, before every pass of the target: the best over all lengths, and that length.

    (1 - a^(n + 1)) / ((1 - a) (n c + 1)), theorem 3.8 of Leviathan et al. (arXiv 2211.17192). 1.0 and 0 where no length pays.
    """
    return max(((sum(acceptance**i for i in range(n + 1)) / (n * cost + 1), n) for n in range(LONGEST + 1)), key=lambda found: found[0])


def best(subsets: Sequence[Subset], count: int) -> Subset:
    """That with the greatest speed-up, where a layer takes 1 / count of a pass."""
    return max(subsets, key=lambda subset: speed_up(subset.acceptance, len(subset.layers) / count)[0])


def as_json(identity: Identity, best: Subset, found: Sequence[Subset], count: int) -> dict[str, Any]:
    """What `--draft layer-skip` reads, `layers`, and how it was found."""

    def told(subset: Subset) -> dict[str, Any]:
        promise, length = speed_up(subset.acceptance, len(subset.layers) / count)
        kept = {"layers": list(subset.layers), "acceptance": round(subset.acceptance, 4)}
        return {**kept, "speed_up": round(promise, 4), "chain": length}

    return {"method": "layer-skip", "target": asdict(identity), **told(best), "others": [told(subset) for subset in found]}


def layers_of(teacher: Teacher) -> nn.ModuleList:
    """Raises ModelRefused where they are not to be found, or there is one alone."""
    found: Any = getattr(getattr(teacher.module, "model", None), "layers", None)
    if not isinstance(found, nn.ModuleList) or len(found) < 2:
        raise ModelRefused(f"model {teacher.model.name} has no layers in model.layers to choose from: choose a target built as Llama is")
    return found


@contextmanager
def only(teacher: Teacher, layers: Sequence[int]) -> Iterator[None]:
    """The target without its other layers, for as long as the block lasts."""
    whole = layers_of(teacher)
    teacher.module.model.layers = nn.ModuleList(whole[layer] for layer in layers)
    try:
        yield
    finally:
        teacher.module.model.layers = whole


def agreement(teacher: Teacher, texts: Sequence[Tensor]) -> Score:
    """On texts (batch, context) each: how often the kept layers' most likely token is the whole target's."""
    wanted = [choices(teacher, rows) for rows in texts]

    def score(layers: Sequence[int]) -> float:
        with only(teacher, layers):
            right = [float((choices(teacher, rows) == truth).float().mean()) for rows, truth in zip(texts, wanted, strict=True)]
        return sum(right) / len(right)

    return score


def choices(teacher: Teacher, rows: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            found: Tensor = teacher.module(rows.to(teacher.model.device), use_cache=False).logits.argmax(-1)
        return found
    except MISFITS as misfit:
        raise ModelRefused(f"model {teacher.model.name} does not run without some of its layers ({misfit}): choose another") from misfit
