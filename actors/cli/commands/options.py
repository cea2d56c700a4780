"""Options that several commands share."""

from enum import StrEnum
from typing import Annotated

import typer

from runtime.core.errors import InvalidRequest

ADDRESS = (
    "Ray cluster, such as auto or ray://host:10001; "
    "default: RAY_ADDRESS, else the local one of `outrider serve`"
)

Address = Annotated[str | None, typer.Option(help=ADDRESS)]
Json = Annotated[bool, typer.Option("--json", help="print only a JSON object on standard output")]


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


ModelDtype = Annotated[
    Dtype, typer.Option(help="auto: float32 on CPU, the checkpoint's dtype on CUDA")
]
NewCluster = Annotated[
    str | None,
    typer.Option(help="Ray cluster, such as auto or ray://host:10001; default: a new local one"),
]
InProcess = Annotated[
    bool, typer.Option("--in-process", help="run the same code without Ray and sockets")
]


def check_utf8(text: str, name: str) -> str:
    """Returns the text. Raises InvalidRequest if it has bytes that could not be decoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{name} is not UTF-8 (character {error.start}): convert it first", name
        ) from error
    return text
