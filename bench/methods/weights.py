"""What each way to guess keeps in memory, and what it took to train it."""

import json
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

LAYER_PREFIX = "model.layers."


@dataclass(frozen=True, slots=True)
class Cost:
    """`keeps`: bytes of weights or tables, beyond the target's own; `training` in words."""

    keeps: int
    training: str


def count_parameters(folder: Path, layers: Container[int] | None = None) -> int:
    """Numbers in the weights of a folder; with `layers` only in these layers of a Llama model, and in what lies outside of its layers."""
    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        for name, size in tensor_sizes(file).items():
            number = name.removeprefix(LAYER_PREFIX).partition(".")[0]
            if layers is None or not name.startswith(LAYER_PREFIX) or int(number) in layers:
                count += size
    return count


def tensor_sizes(file: Path) -> dict[str, int]:
    """Numbers in each tensor, from the head of the file alone."""
    with file.open("rb") as stream:
        head = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    found = {}
    for name, tensor in head.items():
        if name != "__metadata__":
            size = 1
            for length in tensor["shape"]:
                size *= length
            found[name] = size
    return found


def card_value(card: Path, name: str, column: int = 1) -> str:
    """What a card's table says of `name`; nothing where there is no card."""
    lines = card.read_text("utf-8").splitlines() if card.is_file() else []
    return next(
        (line.split("|")[1 + column].strip() for line in lines if line.startswith(f"| {name} |")),
        "",
    )


def training_cost(folder: Path) -> str:
    """Steps and time, as the card of a training says."""
    steps, time = (
        card_value(folder / "README.md", "steps"),
        card_value(folder / "README.md", "time of the last run"),
    )
    return f"{steps}; {time}" if steps else "not known"
