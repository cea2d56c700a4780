"""Parses and checks the arguments of training methods: shapes, layers, draft models."""

import re
from typing import TYPE_CHECKING

from runtime.core.errors import InvalidRequest

if TYPE_CHECKING:
    from training.shapes import DraftShape

MAX_LAYERS = 256


def parse_shape(shape: str) -> "DraftShape":
    """Parses HIDDENxLAYERS. Raises InvalidRequest if it is invalid."""
    from training.shapes import HIDDEN_STEP, MAX_HIDDEN, DraftShape

    found = re.fullmatch(r"(\d{1,5})x(\d{1,3})", shape)
    if (
        not found
        or int(found[1]) % HIDDEN_STEP
        or not HIDDEN_STEP <= int(found[1]) <= MAX_HIDDEN
        or not 1 <= int(found[2]) <= MAX_LAYERS
    ):
        what = f"a multiple of {HIDDEN_STEP} up to {MAX_HIDDEN}, and 1 to {MAX_LAYERS} layers"
        raise InvalidRequest(
            f"shape {shape[:32]!r} is invalid: give HIDDENxLAYERS, {what}, such as 128x2",
            "shape",
        )
    return DraftShape(int(found[1]), int(found[2]))


def short_fingerprint(model: str) -> str:
    """Returns a fingerprint of the model's files, so that other files start another training."""
    from training.teacher import fingerprint

    return fingerprint(model)[:12]


def check_vocabulary(target: str, start: str) -> None:
    """Raises PairMismatch if the vocabularies differ, and ModelRefused as loading would."""
    from actors.launch.prepare import context_length
    from runtime.models.loader import load_tokenizer
    from runtime.models.vocab_check import check_pair

    ours, theirs = load_tokenizer(target), load_tokenizer(start)
    contexts = context_length(target), context_length(start)
    check_pair(ours, theirs, (target, start), contexts)
    check_pair(theirs, ours, (start, target), contexts)  # training needs every token


def depth_of(target: str) -> int:
    """Returns the number of layers. Raises ModelRefused."""
    from runtime.models.loader import read_config
    from runtime.models.model_folder import find_folder

    depth: int = (
        read_config(find_folder(target), target).get_text_config(decoder=True).num_hidden_layers
    )
    return depth


def kept_layers(depth: int, skip: str | None) -> list[int]:
    """Returns the layers that are not skipped. Raises InvalidRequest if `skip` is invalid."""
    from training.s3d import default_skipped

    left_out = set(default_skipped(depth))
    if skip is not None:
        pieces = re.fullmatch(r"(\d{1,4}(-\d{1,4})?,)*", f"{skip},") and [
            piece.partition("-") for piece in skip.split(",")
        ]
        left_out = {
            layer
            for first, _, last in pieces or ()
            for layer in range(int(first), int(last or first) + 1)
        }
    layers = [layer for layer in range(depth) if layer not in left_out]
    if not layers or not left_out <= set(range(depth)) or (skip is not None and not left_out):
        raise InvalidRequest(
            f"skip {str(skip)[:32]!r} is invalid: give some of layers 0 to {depth - 1}, such as "
            "2-4 or 1,3",
            "skip",
        )
    return layers


def entry_layers(target: str, layers: list[int] | None, positions: int) -> list[int]:
    """Returns the layers at which pseudo states enter. Raises InvalidRequest for invalid ones."""
    from training.hidden_transfer import default_layers

    depth = depth_of(target)
    chosen = layers or default_layers(depth, positions)
    if chosen != sorted(chosen) or not 1 <= chosen[0] <= chosen[-1] < depth:
        raise InvalidRequest(
            f"layers {', '.join(map(str, chosen))} are invalid: give rising numbers from 1 to "
            f"{depth - 1}",
            "layers",
        )
    return chosen


def tapped_layers(target: str, layers: list[int] | None) -> list[int]:
    """Returns the layers whose inputs EAGLE fuses. Raises InvalidRequest for invalid ones."""
    from training.eagle import default_layers

    depth = depth_of(target)
    chosen = layers or default_layers(depth)
    if chosen != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] <= depth:
        raise InvalidRequest(
            f"layers {', '.join(map(str, chosen))} are invalid: give rising numbers from 0 to "
            f"{depth}",
            "layers",
        )
    return chosen
