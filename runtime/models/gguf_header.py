"""Reads and checks the header of a GGUF file, which is untrusted, within the bounds of the file.

A length in the header is compared with what the file holds before anything is read or allocated,
so the parsers that come after it cannot be led beyond the file or into an endless loop. The format
is that of ggml's docs/gguf.md, versions 2 and 3.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from runtime.core.errors import ModelRefused

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 1 << 28
MAX_VALUES, MAX_TENSORS = 1 << 12, 1 << 16
MAX_ARRAY_ITEMS = 1 << 22  # in all arrays together; large vocabularies have 300,000 tokens
MAX_DIMENSIONS = 4
MAX_EXPERTS = 1 << 10
MAX_ALIGNMENT = 1 << 16

# The codes of the types of single values, and their layout as struct names it
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
STRING, ARRAY = 8, 9

Scalar = int | float | bool | str


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The checked header of a file.

    values      the metadata that are one number or one string
    parameters  the number of weights in all tensors
    types       the names of the tensors' types, such as Q4_1, the one of most weights first
    tensors     the number of tensors
    """

    values: Mapping[str, Scalar]
    parameters: int
    types: tuple[str, ...]
    tensors: int

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture", ""))

    def number(self, key: str) -> int | None:
        """Return an integer of the architecture or the tokenizer, or None if there is none."""
        value = self.values.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None


def read_header(file: Path) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises ModelRefused for a file that is no GGUF, is truncated, or exceeds a limit, and OSError.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size < 24 or opened.read(4) != MAGIC:
            raise ModelRefused(f"{file} is not a GGUF file: give a file that begins with GGUF")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(data, file).header()
            except _Broken as error:
                raise ModelRefused(
                    f"{file} is a broken GGUF file ({error}): copy it again"
                ) from error


class _Broken(Exception):
    """The header contradicts itself or the file."""


class _Reader:
    """Reads numbers and strings one after the other, never beyond the header's limit."""

    def __init__(self, data: mmap.mmap, file: Path) -> None:
        self.data, self.file, self.place, self.items = data, file, len(MAGIC), 0

    def header(self) -> GgufHeader:
        version, tensors, count = self.numbers("IQQ")
        if version not in VERSIONS:
            raise ModelRefused(
                f"{self.file} is GGUF version {version}: "
                "convert it to version 3 with a current llama.cpp"
            )
        if tensors > MAX_TENSORS or count > MAX_VALUES:
            raise _Broken(f"{tensors} tensors and {count} values")
        values: dict[str, Scalar] = {}
        for _ in range(count):
            key = self.string()
            value = self.value(self.numbers("I")[0])
            if value is not None:
                values[key] = value
        weights = self.tensors(tensors, values.get("general.alignment", 32))
        found = GgufHeader(
            values,
            sum(weights.values()),
            tuple(sorted(weights, key=lambda kind: -weights[kind])),
            tensors,
        )
        check_sizes(found)
        return found

    def tensors(self, count: int, alignment: Scalar) -> dict[str, int]:
        """Read the table of tensors; return the number of weights of each type."""
        if not isinstance(alignment, int) or not 1 <= alignment <= MAX_ALIGNMENT:
            raise _Broken(f"alignment {alignment}")
        ends: list[int] = [0]
        total, weights = 0, dict[str, int]()
        for _ in range(count):
            name = self.string()
            (dimensions,) = self.numbers("I")
            if dimensions > MAX_DIMENSIONS:
                raise _Broken(f"tensor {name[:64]!r} has {dimensions} dimensions")
            shape = self.numbers(f"{dimensions}Q")
            code, offset = self.numbers("IQ")
            try:
                kind = GGMLQuantizationType(code)
            except ValueError as error:
                raise _Broken(f"tensor {name[:64]!r} has the unknown type {code}") from error
            block, size = GGML_QUANT_SIZES[kind]
            elements = math.prod(shape)
            if elements % block or (shape and shape[0] % block):
                raise _Broken(f"tensor {name[:64]!r} has a part of a block")
            weights[kind.name] = weights.get(kind.name, 0) + elements
            total += elements // block * size
            ends.append(offset + elements // block * size)
        start = -(-self.place // alignment) * alignment
        if start + max(*ends, total) > len(self.data):
            raise _Broken(
                f"its tensors need {start + max(*ends, total)} bytes, it has {len(self.data)}"
            )
        return weights

    def value(self, kind: int) -> Scalar | None:
        """Read one value of the metadata. Arrays are walked over and returned as None."""
        if kind in SCALARS:
            scalar: Scalar = self.numbers(SCALARS[kind])[0]
            return scalar
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise _Broken(f"a value of type {kind}")
        item, count = self.numbers("IQ")
        self.items += count
        if self.items > MAX_ARRAY_ITEMS:
            raise _Broken(f"arrays of more than {MAX_ARRAY_ITEMS} items")
        if item in SCALARS:
            self.skip(count * struct.calcsize(SCALARS[item]))
        elif item == STRING:
            for _ in range(count):
                self.skip(self.numbers("Q")[0])
        else:
            raise _Broken(f"an array of type {item}")
        return None

    def numbers(self, layout: str) -> tuple[int, ...]:
        start = self.place
        self.skip(struct.calcsize(f"<{layout}"))
        return struct.unpack_from(f"<{layout}", self.data, start)

    def string(self) -> str:
        (length,) = self.numbers("Q")
        start = self.place
        self.skip(length)
        try:
            return self.data[start : self.place].decode()
        except UnicodeDecodeError as error:
            raise _Broken("a string that is not UTF-8") from error

    def skip(self, length: int) -> None:
        if self.place + length > min(len(self.data), MAX_HEADER_BYTES):
            raise _Broken("its header does not end within the file")
        self.place += length


def check_sizes(header: GgufHeader) -> None:
    """Raise _Broken if the metadata describe a model that the tensors cannot hold."""
    kind = header.architecture
    if not kind:
        raise _Broken("it names no general.architecture")
    layers = header.number(f"{kind}.block_count") or 0
    if layers > header.tensors:  # every layer has weights of its own
        raise _Broken(f"{layers} layers in {header.tensors} tensors")
    experts = header.number(f"{kind}.expert_count") or 0
    if experts > MAX_EXPERTS:
        raise _Broken(f"{experts} experts")
