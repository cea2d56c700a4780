"""`outrider certs`: certificates for one deployment, made once and laid on its nodes."""

import datetime
import os
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from runtime.core.errors import InvalidRequest
from runtime.core.sampling_params import check_int

NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,40}")
HOST = re.compile(r"[A-Za-z0-9:*][A-Za-z0-9:.*-]{0,252}")
HTTPS = "https"

INSTRUCTIONS = """\
{count} files in {folder}, valid until {until}. Into the deployment file:

security:
  tls: {{ca: {folder}/ca.pem, cert: "{folder}/{{role}}.pem", key: "{folder}/{{role}}-key.pem"}}
gateway:
  tls: {{ca: {folder}/ca.pem, cert: {folder}/https.pem, key: {folder}/https-key.pem}}

Copy them to the same path on every node; one that hosts drafters alone needs ca.pem and the two files of the drafter. HTTPS clients
trust the gateway by ca.pem. The authority's key was not kept, so that nobody can sign with it: to renew, make a new folder.
"""


def certs(
    folder: Annotated[
        Path, typer.Argument(help="where to put them; must not exist yet, or be empty")
    ],
    days: Annotated[int, typer.Option(help="how long they are valid")] = 365,
    name: Annotated[
        str, typer.Option(help="of the deployment, for people who read a certificate")
    ] = "outrider",
    host: Annotated[
        list[str] | None,
        typer.Option(
            help="name or IP address that HTTPS clients reach the gateway at; may be repeated"
        ),
    ] = None,
) -> None:
    """Make a certificate authority, a certificate for each role of actors, and one for the gateway's HTTPS."""
    from actors.rpc.certificate_authority import CertificateAuthority  # grpc: `--help` needs none

    check_int("days", days, 1, 3650)
    if not NAME.fullmatch(name):
        raise InvalidRequest(
            f"name {name[:64]!r} is not allowed: give up to 41 lower-case letters, digits, dots and dashes",
            "name",
        )
    hosts = host or ["localhost", "127.0.0.1", "::1"]
    for given in hosts:
        if not HOST.fullmatch(given):
            raise InvalidRequest(
                f"host {given[:64]!r} is neither a name nor an IP address: give what clients write into the URL",
                "host",
            )
    authority = CertificateAuthority(name, datetime.datetime.now(datetime.UTC), days)
    files = {"ca.pem": authority.certificate}
    for stem, signed in {**authority.roles(), HTTPS: authority.https_server(hosts)}.items():
        files |= {f"{stem}.pem": signed.certificate, f"{stem}-key.pem": signed.key}
    write_files(folder, files)
    text = INSTRUCTIONS.format(
        count=len(files), folder=folder.absolute(), until=f"{authority.ends:%Y-%m-%d}"
    )
    Console(soft_wrap=True, highlight=False, markup=False).print(text, end="")


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Readable for their owner alone. Raises InvalidRequest where there is something already: nothing is overwritten."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InvalidRequest(
                f"{folder} is not empty: give a new folder, certificates in use are not overwritten",
                "folder",
            )
        folder.chmod(0o700)
        for name, content in files.items():
            with os.fdopen(
                os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb"
            ) as file:
                file.write(content)
    except OSError as error:
        raise InvalidRequest(
            f"{folder} cannot be written ({error.strerror}): give another folder", "folder"
        ) from error
