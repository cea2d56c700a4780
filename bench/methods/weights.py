"""The memory that each drafting method needs, and the cost of its training."""

import json
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

LAYER_PREFIX = "model.layers."


@dataclass(frozen=True, slots=True)
class Cost:
    """The costs of a method: `keeps` in bytes of weights or tables besides the target's; `training`
    in words."""

    keeps: int
    training: str


def count_parameters(folder: Path, layers: Container[int] | None = None) -> int:
    """Count the parameters in a folder's weights.

    With `layers`, count only these layers of a Llama model and everything outside its layers.
    """
    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        for name, size in tensor_sizes(file).items():
            number = name.removeprefix(LAYER_PREFIX).partition(".")[0]
            if layers is None or not name.startswith(LAYER_PREFIX) or int(number) in layers:
                count += size
    return count


def tensor_sizes(file: Path) -> dict[str, int]:
    """Return the number of elements of each tensor, read from the file's header."""
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
    """Return the value of `name` in a card's table, or "" if there is no card."""
    lines = card.read_text("utf-8").splitlines() if card.is_file() else []
    return next(
        (line.split("|")[1 + column].strip() for line in lines if line.startswith(f"| {name} |")),
        "",
    )


def training_cost(folder: Path) -> str:
    """Return steps and time from the card of a training."""
    steps, time = (
        card_value(folder / "README.md", "steps"),
        card_value(folder / "README.md", "time of the last run"),
    )
    return f"{steps}; {time}" if steps else "not known"
