"""Options beside a file that says all of it."""

import typer

from runtime.core.errors import InvalidRequest


def refuse_with_file(context: typer.Context, file: str, *options: str) -> None:
    """Raises InvalidRequest where one of these options was given on the command line: nobody is to believe that it counts."""
    for name in options:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = "--" + name.replace("_", "-")
            raise InvalidRequest(f"give either a file or {flag}: {file} says all of it", name)
