"""Checks options against a file that replaces them."""

import typer

from runtime.core.errors import InvalidRequest


def refuse_with_file(context: typer.Context, file: str, *options: str) -> None:
    """Raises InvalidRequest if one of these options is given together with the file."""
    for name in options:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = "--" + name.replace("_", "-")
            raise InvalidRequest(f"give either a file or {flag}: {file} replaces this option", name)
