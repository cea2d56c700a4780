"""`outrider certs` makes the certificates that a deployment needs."""

import re
import stat
from pathlib import Path

import pytest
import yaml
from cryptography import x509

from actors.rpc.tls import ROLES, read_credentials
from runtime.config import Deployment
from tests.support.command import outrider


def test_the_command_makes_what_a_deployment_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "deep" / "certs"
    assert (
        outrider(
            monkeypatch,
            "certs",
            folder,
            "--days",
            3,
            "--name",
            "lab-1",
            "--host",
            "llm.example",
            "--host",
            "10.0.0.7",
        )
        == 0
    )
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
    said = capsys.readouterr().out
    block = said[said.index("security:") : said.index("\n\nCopy")]
    plan = Deployment.model_validate({"target": {"model": "m"}, **yaml.safe_load(block)})
    assert plan.security.tls is not None
    assert plan.gateway.tls is not None
    for role in ROLES:
        certificate = x509.load_pem_x509_certificate(read_credentials(plan.security.tls, role)[1])
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == [
            f"outrider://{role}/lab-1"
        ]
    website = x509.load_pem_x509_certificate(plan.gateway.tls.cert.read_bytes())
    names = website.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["llm.example"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    assert not any("PRIVATE KEY" in file.read_text() for file in folder.glob("ca*"))


def test_the_command_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outrider(monkeypatch, "certs", tmp_path / "certs") == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "certs").iterdir()}
    capsys.readouterr()
    assert outrider(monkeypatch, "certs", tmp_path / "certs") == 2
    assert re.fullmatch(
        r"outrider: \S+ is not empty: give a new folder, .*\n", capsys.readouterr().err
    )
    assert {file.name: file.read_bytes() for file in (tmp_path / "certs").iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--days", "0"], "days 0"),
        (["--days", "9999"], "days 9999"),
        (["--name", "../x"], "name '../x'"),
        (["--host", "a b"], "host 'a b'"),
        (["--host", "https://x"], "host 'https://x'"),
        (["--host", "ümlaut"], "host 'ümlaut'"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert outrider(monkeypatch, "certs", tmp_path / "certs", *arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert named in said.err
    assert not (tmp_path / "certs").exists()


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert outrider(monkeypatch, "certs", tmp_path / "file" / "certs") == 2
    assert "(Not a directory)" in capsys.readouterr().err
