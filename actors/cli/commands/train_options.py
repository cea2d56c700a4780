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

# Of the drafters that read the target's hidden states
MoreData = Annotated[
    list[Path] | None,
    typer.Option(
        help="files or folders of UTF-8 text to learn from too (repeatable); a target without "
        "a chat template takes Python's standard library by default"
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        help='JSON Lines with "prompt" or "turns": the acceptance is measured on them too'
    ),
]
FusedLayers = Annotated[
    list[int] | None,
    typer.Option(
        help="layers of the target whose inputs are fused (repeatable, rising); default: a "
        "low, a middle and a high one"
    ),
]
Intermediate = Annotated[int, typer.Option(help="size of the layer's MLP")]
DraftVocabulary = Annotated[
    int, typer.Option(help="number of tokens that can be guessed: the most frequent ones")
]
OwnConversations = Annotated[
    int, typer.Option(help="tokens of conversations that the target writes first")
]
