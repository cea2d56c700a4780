"""The card of a trained model: the README.md in its folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.models.acceptance import RANKS
from training.acceptance import HeldOutAcceptance
from training.loop import smooth
from training.shapes import DraftShape, Times
from training.text import Corpus

TITLES = {
    "medusa": "Medusa heads",
    "hidden-transfer": "Hidden transfer",
    "s3d": "S3D",
    "draft": "Draft model",
    "eagle": "EAGLE drafter",
    "block": "Block drafter",
}
CURVE_POINTS = 8  # of the loss curve

TEMPLATE = """---
library_name: outrider
base_model: {base}
---

# {title} for {base}

Drafts for its target without changing any of its tokens. Use it:
`outrider generate --target {base} --draft FOLDER`.

| | |
|---|---|
| settings | {settings} |
| data | {documents} documents, {tokens:.2f}M training tokens, {held_out:.2f}M held out |
| the target's own texts | {own} |
| steps | {steps} of {batch} texts of {context} tokens, {passed:.2f} million tokens in total |
| loss at the end | {loss:.3f} |
| time of the last run | {minutes:.1f} minutes |
| seed | {seed} |

## Acceptance

How often the first k guesses for a position contain the token that the target chooses there, on the
target's own continuations of held-out texts, by the rule of the runtime (at temperature > 0 guesses
and choices share their noise).

{acceptance}

## Loss

{curve}
"""


def render_card(
    method: str,
    target: str,
    order: dict[str, Any],
    corpus: Corpus,
    losses: list[float],
    seconds: float,
    measured: Sequence[HeldOutAcceptance],
) -> str:
    """Return the card.

    `seconds` is the time of the last run, which may have resumed an interrupted training.
    """
    own = order["own"]
    share = "with their prompts" if order["method"] in ("block", "eagle") else "half of each batch"
    return TEMPLATE.format(
        title=TITLES[method],
        base=Path(target).name if Path(target).is_dir() else target,
        settings=", ".join(
            f"{key} {value}" for key, value in order["settings"].items() if value is not None
        ),
        documents=corpus.documents,
        tokens=len(corpus.train) / 1e6,
        held_out=len(corpus.held_out) / 1e6,
        own=f"about {own / 1e6:.2f} million tokens, {share}" if own else "none",
        steps=order["steps"],
        batch=order["batch"],
        context=order["context"],
        passed=order["steps"] * order["batch"] * order["context"] / 1e6,
        loss=smooth(losses)[-1],
        minutes=seconds / 60,
        seed=order["seed"],
        acceptance=acceptance_table(measured),
        curve=loss_curve(losses),
    )


def acceptance_table(measured: Sequence[HeldOutAcceptance]) -> str:
    rows = [
        "| temperature | position | "
        + " | ".join(f"k = {rank}" for rank in RANKS)
        + " | tokens per step, one guess each |"
    ]
    rows.append("|---" * (len(RANKS) + 3) + "|")
    for at in measured:
        for place, rates in enumerate(at.rates, start=1):
            cells = " | ".join(f"{rates[rank]:.3f}" for rank in RANKS)
            rows.append(
                f"| {at.temperature:g} | {place} | {cells} | "
                f"{f'{at.chain:.2f}' if place == 1 else ''} |"
            )
    return "\n".join(rows)


def loss_curve(losses: list[float]) -> str:
    """Return a table of the smoothed loss at evenly spaced steps."""
    smoothed, last = smooth(losses), len(losses) - 1
    steps = sorted({round(index * last / (CURVE_POINTS - 1)) for index in range(CURVE_POINTS)})
    head = "| step | " + " | ".join(str(step + 1) for step in steps) + " |"
    return "\n".join(
        [
            head,
            "|---" * (len(steps) + 1) + "|",
            "| loss | " + " | ".join(f"{smoothed[step]:.3f}" for step in steps) + " |",
        ]
    )


def shapes_table(curve: Mapping[DraftShape, Times], vocabulary: int) -> str:
    """Return a card section with the pass times of shapes of one size, or "" if none was
    measured."""
    if not curve:
        return ""
    widths = sorted(next(iter(curve.values())))
    rows = [
        "",
        "## Shape",
        "",
        "Milliseconds of a pass by rows, for shapes of about the same size; the first was chosen.",
        "",
    ]
    rows.append(
        "| layers | hidden size | million parameters | "
        + " | ".join(f"t({width})" for width in widths)
        + " |"
    )
    rows.append("|---" * (len(widths) + 3) + "|")
    for shape, times in curve.items():
        cells = " | ".join(f"{1e3 * times[width]:.2f}" for width in widths)
        rows.append(
            f"| {shape.layers} | {shape.hidden} | {shape.parameters(vocabulary) / 1e6:.2f} | "
            f"{cells} |"
        )
    return "\n".join(rows) + "\n"
