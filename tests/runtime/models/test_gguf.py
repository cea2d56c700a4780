"""A GGUF file is converted once into an ordinary folder; a bad one is refused."""

import multiprocessing
import os
import shutil
import struct
from pathlib import Path

import gguf
import pytest
import torch

from actors.compose import eos_tokens
from runtime.core.errors import ModelRefused
from runtime.models import gguf_model
from runtime.models.gguf_header import MAX_ARRAY_ITEMS, read_header
from runtime.models.loader import load_model, load_tokenizer
from runtime.models.model_folder import find_folder
from tests.support.gguf_files import CONTEXT, EOS, EOT, TEMPLATE, tiny_llama, write_gguf
from tests.support.model_folders import refused
from tests.support.pair import SHIPPED

U32, U64, STRING, ARRAY = 4, 10, 8, 9


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "outrider" / "gguf"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def file(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(written, tmp_path / "tiny.gguf"))


def left(cache: Path) -> list[str]:
    """What an attempt left in the cache but for locks and hashes."""
    return [path.name for path in cache.glob("*") if path.suffix not in (".lock", ".sha256")]


def test_the_weights_are_those_of_the_file_in_bfloat16(file: Path) -> None:
    expected = tiny_llama().state_dict()
    model = load_model(str(file), "bfloat16", "cpu", step="generic")
    found = model.module.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.bfloat16()), name
    assert model.context == CONTEXT


def test_tokenizer_template_and_ends_come_along(file: Path) -> None:
    tokenizer, shipped = load_tokenizer(str(file)), load_tokenizer(str(SHIPPED))
    text = "def read(path):\n    return 12 == 3  # é"
    assert tokenizer.encode(text) == shipped.encode(text)
    assert tokenizer.chat_template == TEMPLATE
    assert eos_tokens(load_model(str(file)), tokenizer) == {EOS, EOT}


def test_four_bits_become_sixteen_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind = gguf.GGMLQuantizationType.Q4_1
    file = write_gguf(tmp_path / "small.gguf", kind=kind)
    folder = find_folder(str(file))
    (said,) = (record.getMessage() for record in caplog.records if "gguf_model" in record.name)
    assert "Q4_1, F32" in said
    assert "bfloat16" in said
    assert str(folder) in said
    values = tiny_llama().state_dict()["model.layers.1.mlp.up_proj.weight"].numpy()
    wanted = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
    module = load_model(str(file), "bfloat16", "cpu", step="generic").module
    found = module.state_dict()["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(found, torch.from_numpy(wanted).bfloat16())


def test_a_file_is_converted_once_by_its_content(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = find_folder(str(file))
    copy = Path(shutil.copy(file, file.with_name("other name.GGUF")))

    def fail(*_: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(gguf_model, "convert", fail)
    assert find_folder(str(file)) == find_folder(str(copy)) == folder
    assert left(cache) == [folder.name]


def test_changed_content_is_another_model(file: Path, tmp_path: Path) -> None:
    first = find_folder(str(file))
    write_gguf(file, tiny_llama(seed=1))
    assert find_folder(str(file)) != first


def find(file: str, found: "multiprocessing.Queue[str]") -> None:
    found.put(str(find_folder(file)))


def test_two_processes_at_once(file: Path, cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    found: multiprocessing.Queue[str] = context.Queue()
    workers = [context.Process(target=find, args=(str(file), found)) for _ in range(2)]
    for worker in workers:
        worker.start()
    folders = {found.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(folders) == 1
    assert left(cache) == [Path(folders.pop()).name]


def test_an_interrupted_conversion_is_begun_again(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(gguf_model, "write_folder", interrupt)
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if it had been killed
        with pytest.raises(KeyboardInterrupt):
            find_folder(str(file))
    assert any(name.endswith(".partial") for name in left(cache))
    folder = find_folder(str(file))
    assert left(cache) == [folder.name]
    load_model(str(file))


def test_a_full_disk(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage("/")._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    refused(file, "which has 1 MiB: free or choose a place with XDG_CACHE_HOME")
    assert left(cache) == []


def test_a_disk_that_fills_up(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_model, "write_folder", full)
    refused(file, "No space left on device")
    assert left(cache) == []


def test_a_cache_that_cannot_be_written(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    refused(file, "choose a place with XDG_CACHE_HOME")


def test_unknown_architectures_and_missing_weights(tmp_path: Path, cache: Path) -> None:
    refused(
        write_gguf(tmp_path / "a.gguf", architecture="teapot"),
        "(architecture 'teapot') cannot be read by transformers",
    )
    refused(write_gguf(tmp_path / "h.gguf", heads=7), "cannot be read by transformers")
    refused(write_gguf(tmp_path / "b.gguf", layers=10**9), "1000000000 layers in 20 tensors")
    refused(write_gguf(tmp_path / "c.gguf", layers=3), "weights that it describes")
    refused(
        write_gguf(tmp_path / "d.gguf", without="blk.1.ffn_up.weight"), "weights that it describes"
    )
    assert left(cache) == []


@pytest.mark.parametrize("share", [0, 10, 30, 400, 30_000, 0.5, 0.999])
def test_a_truncated_file(file: Path, share: float, cache: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: share if isinstance(share, int) else int(share * len(data))])
    refused(file, "a broken GGUF file" if share > 24 or 0 < share < 1 else "is not a GGUF file")
    assert left(cache) == []


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(*values: bytes, tensors: bytes = b"", count: int = 0, version: int = 3) -> bytes:
    start = b"GGUF" + struct.pack("<IQQ", version, count, len(values))
    return start + b"".join(values) + tensors + bytes(64)


ARCHITECTURE = text(b"general.architecture") + struct.pack("<I", STRING) + text(b"llama")


def tensor(*shape: int, kind: int = 0, offset: int = 0, name: bytes = b"t") -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\3\4" + bytes(100), "is not a GGUF file"),
        (header(version=1), "is GGUF version 1: convert it"),
        (header(version=1 << 24), "is GGUF version"),
        (header(), "names no general.architecture"),
        (header(ARCHITECTURE, count=1 << 40), f"{1 << 40} tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60) + bytes(64), f"{1 << 60} values"),
        (header(struct.pack("<Q", 1 << 62)), "does not end within the file"),
        (header(text(b"k") + struct.pack("<I", 13)), "a value of type 13"),
        (header(text(b"\xff") + struct.pack("<I", 0)), "not UTF-8"),
        (
            header(text(b"k") + struct.pack("<IIQ", ARRAY, 0, 1 << 60)),
            f"more than {MAX_ARRAY_ITEMS} items",
        ),
        (header(text(b"k") + struct.pack("<IIQ", ARRAY, U64, 1 << 20)), "does not end within"),
        (header(text(b"k") + struct.pack("<IIQ", ARRAY, ARRAY, 1)), "an array of type 9"),
        (
            header(text(b"general.alignment") + struct.pack("<II", U32, 0), ARCHITECTURE),
            "alignment 0",
        ),
        (header(ARCHITECTURE, tensors=tensor(4, kind=99), count=1), "unknown type 99"),
        (header(ARCHITECTURE, tensors=tensor(*[1] * 5), count=1), "5 dimensions"),
        (header(ARCHITECTURE, tensors=tensor(1 << 40, 1 << 40), count=1), "its tensors need"),
        (header(ARCHITECTURE, tensors=tensor(4, offset=1 << 62), count=1), "its tensors need"),
        (header(ARCHITECTURE, tensors=tensor(12, kind=2), count=1), "a part of a block"),
        (header(ARCHITECTURE, tensors=tensor(8) * 3, count=3), "its tensors need"),
    ],
)
def test_a_hostile_header(data: bytes, message: str, tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "hostile.gguf"
    file.write_bytes(data)
    refused(file, message)
    assert left(cache) == []


def test_what_the_header_tells(file: Path) -> None:
    found = read_header(file)
    assert found.architecture == "llama"
    assert found.types == ("F32",)
    assert found.parameters == sum(weight.numel() for weight in tiny_llama().parameters())
    assert found.number("tokenizer.ggml.eot_token_id") == EOT


def test_a_file_that_is_not_there_and_one_that_is_no_model(tmp_path: Path) -> None:
    refused(tmp_path / "none.gguf", "does not exist: give the path of a GGUF file")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "or a .gguf file")


def test_a_catalogue_name_that_is_not_pulled() -> None:
    with pytest.raises(ModelRefused, match="run `outrider pull smollm2-135m`"):
        find_folder("smollm2-135m")
