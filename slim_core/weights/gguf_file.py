"""The header of a GGUF file from a stranger: metadata and the places of its tensors, read with limits.

The `gguf` package's own reader makes several objects of every token and merge, gigabytes for a large vocabulary; this
one makes plain lists. Values that nobody here reads are skipped.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_TENSORS = 100_000
_MAX_FIELDS = 10_000
_MAX_DIMENSIONS = 2
_MAX_NAME_BYTES = 65_535
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Of struct, by type of a value."""
_STRING, _ARRAY = 8, 9
_BLOCK_VALUES = 1 << 16


class GgufError(ValueError):
    """A file that is no GGUF model that can be converted; the message says why."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor in the file."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    """In our order: the rows, (outputs, inputs) of a matrix."""
    offset: int
    """From the start of the file, in bytes."""
    bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A header."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(path: Path, wanted: Callable[[str], bool]) -> GgufFile:
    """The header of a file, with the values of the fields that are `wanted`. Raises GgufError and OSError."""
    with path.open("rb") as file:
        reader = _Reader(file, path.stat().st_size)
        if reader.read(4) != _MAGIC:
            raise GgufError("no GGUF file")
        version = reader.scalar("I")
        if version not in _VERSIONS:
            raise GgufError(f"GGUF version {version}; {' and '.join(map(str, _VERSIONS))} of little-endian are read")
        num_tensors = reader.count(_MAX_TENSORS, "tensors")
        num_fields = reader.count(_MAX_FIELDS, "fields of metadata")
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            name = reader.string(_MAX_NAME_BYTES)
            if name in fields:
                raise GgufError(f"the field {name!r} is there twice")
            fields[name] = reader.value(reader.scalar("I"), keep=wanted(name) or name == "general.alignment")
        entries = [_tensor(reader) for _ in range(num_tensors)]
        tensors = _placed(entries, fields.get("general.alignment") or 32, reader)
    return GgufFile(path, {name: value for name, value in fields.items() if value is not None}, tensors)


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self.size = size

    @property
    def offset(self) -> int:
        return self._file.tell()

    def read(self, count: int) -> bytes:
        if count > self.size - self.offset:
            raise GgufError("the file ends within its header")
        return self._file.read(count)

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack(f"<{code}", self.read(struct.calcsize(f"<{code}")))
        return value

    def count(self, limit: int, what: str) -> int:
        count: int = self.scalar("Q")
        if count > limit:
            raise GgufError(f"{count} {what}; at most {limit} are read")
        return count

    def string(self, limit: int | None = None) -> str:
        try:
            return self.read(self.count(self.size if limit is None else limit, "bytes of a string")).decode()
        except UnicodeDecodeError as error:
            raise GgufError(f"a string is no UTF-8, before byte {self.offset}") from error

    def value(self, kind: int, *, keep: bool) -> Any:
        """A value of metadata; None for one that is not kept."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise GgufError(f"a value of the unknown type {kind}")
        item = self.scalar("I")
        count = self.count(self.size, "values of an array")
        if item == _STRING:
            strings = [text for text in (self.string() for _ in range(count)) if keep]
            return strings if keep else None
        if item not in _SCALARS:
            raise GgufError(f"an array of the unsupported type {item}")
        width = struct.calcsize(f"<{_SCALARS[item]}")
        if count * width > self.size - self.offset:
            raise GgufError("the file ends within its header")
        if not keep:
            self._file.seek(count * width, 1)
            return None
        values: list[Any] = []
        for first in range(0, count, _BLOCK_VALUES):
            block = min(_BLOCK_VALUES, count - first)
            values += struct.unpack(f"<{block}{_SCALARS[item]}", self.read(block * width))
        return values


def _tensor(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name = reader.string(_MAX_NAME_BYTES)
    dimensions = reader.scalar("I")
    if dimensions > _MAX_DIMENSIONS:
        raise GgufError(f"{name!r} has {dimensions} dimensions; at most {_MAX_DIMENSIONS} are read")
    shape = tuple(reader.scalar("Q") for _ in range(dimensions))
    return name, shape[::-1], reader.scalar("I"), reader.scalar("Q")


def _placed(
    entries: list[tuple[str, tuple[int, ...], int, int]], alignment: Any, reader: _Reader
) -> dict[str, GgufTensor]:
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise GgufError(f"general.alignment: {alignment!r} is no power of two")
    start = -(-reader.offset // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, number, offset in entries:
        if name in tensors:
            raise GgufError(f"the tensor {name!r} is there twice")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as error:
            raise GgufError(f"{name!r} has the unknown type {number}") from error
        if min(shape, default=1) < 1:
            raise GgufError(f"{name!r} has shape {shape}: a dimension is not at least 1")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise GgufError(f"{name!r} has shape {shape}: its rows are no whole blocks of {kind.name}")
        size = math.prod(shape) // block * block_bytes
        if start + offset + size > reader.size:
            raise GgufError(f"the file ends within {name!r}")
        tensors[name] = GgufTensor(name, kind, shape, start + offset, size)
    _refuse_overlaps(tensors)
    return tensors


def _refuse_overlaps(tensors: dict[str, GgufTensor]) -> None:
    """Bytes that are in many tensors would make a large folder of a small file."""
    ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset)
    for left, right in itertools.pairwise(ordered):
        if left.offset + left.bytes > right.offset:
            raise GgufError(f"{left.name!r} and {right.name!r} overlap")
