"""Options that the training commands share."""

from pathlib import Path
from typing import Annotated

import typer

Target = Annotated[
    str | None, typer.Option(help="model name, folder or .gguf file; default: the bundled one")
]
Data = Annotated[
    list[Path] | None,
    typer.Option(
        help="files or folders of UTF-8 text (repeatable); default: Python's standard library"
    ),
]
Out = Annotated[Path, typer.Option(help="folder to create; unfinished work is in FOLDER.partial")]
Steps = Annotated[int, typer.Option(help="optimizer steps")]
Batch = Annotated[int, typer.Option(help="texts per step")]
Context = Annotated[int, typer.Option(help="tokens per text")]
Own = Annotated[
    int,
    typer.Option(help="tokens that the target generates first, as half of each batch; 0: none"),
]
Seed = Annotated[
    int, typer.Option(help="makes results reproducible on the same CPU and number of threads")
]
