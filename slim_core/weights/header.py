"""The header of a safetensors file. A stranger's is read with limits and checked against the file. Free of torch.

Source: https://github.com/huggingface/safetensors#format. Eight bytes of length, little-endian; a JSON object from
names to dtype, shape and offsets behind the header; the tensors, one after the other without holes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 8 << 20
"""About 60,000 tensors."""
_MAX_DIMENSIONS = 8
_WRITTEN_ORDER = ("I64", "F64", "F32", "BF16", "F16")
"""Of safetensors' own writer: the widest first, so that every tensor is aligned."""
DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}


class HeaderError(ValueError):
    """What is wrong; the file's name is the caller's to add."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """From the start of the file, in bytes."""
    bytes: int


Header = dict[str, StoredTensor]


def read_metadata(path: Path) -> dict[str, Any]:
    """What a file says of itself beside its tensors. Raises HeaderError and OSError."""
    metadata = _fields(path)[0].get("__metadata__", {})
    if not isinstance(metadata, dict):
        raise HeaderError("__metadata__ must be a JSON object")
    return metadata


def read_header(path: Path) -> Header:
    """The tensors of a file, in the order of their places. Raises HeaderError and OSError."""
    fields, end, size = _fields(path)
    fields.pop("__metadata__", None)
    tensors = sorted((_tensor(name, entry, end) for name, entry in fields.items()), key=_place)
    for tensor in tensors:
        if tensor.offset != end:
            relation = "overlaps" if tensor.offset < end else "does not follow"
            raise HeaderError(f"{tensor.name!r} {relation} the end of the tensor before it, byte {end}")
        end += tensor.bytes
    if end != size:
        raise HeaderError(f"{size} bytes long, but its tensors end at {end}")
    return {tensor.name: tensor for tensor in tensors}


def _fields(path: Path) -> tuple[dict[str, Any], int, int]:
    """The JSON object, where it ends, and the file's size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise HeaderError(f"{size} bytes are fewer than its header of {length} needs")
        if length > MAX_HEADER_BYTES:
            raise HeaderError(f"a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
        return loads(file.read(length)), 8 + length, size


def header_bytes(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[list[str], bytes]:
    """What a file of these tensors, {name: (dtype, shape)}, begins with, and the order in which they follow."""
    names = sorted(tensors, key=lambda name: (_WRITTEN_ORDER.index(tensors[name][0]), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        dtype, shape = tensors[name]
        start, end = end, end + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return names, len(text).to_bytes(8, "little") + text


def loads(text: bytes) -> dict[str, Any]:
    """A JSON object in which no name stands twice and every number is one. Raises HeaderError."""
    try:
        data = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise HeaderError("too deeply nested") from error
    except ValueError as error:
        raise HeaderError(str(error) if isinstance(error, HeaderError) else f"no JSON: {error}") from error
    if not isinstance(data, dict):
        raise HeaderError("must be a JSON object")
    return data


def _tensor(name: str, entry: Any, data_start: int) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"{name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise HeaderError(f"{name!r} has the unknown type {str(dtype)[:40]!r}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise HeaderError(f"{name!r} has no shape of up to {_MAX_DIMENSIONS} whole numbers")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise HeaderError(f"{name!r} must have two whole numbers as data_offsets")
    size = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != size:
        raise HeaderError(f"{name!r} has {offsets[1] - offsets[0]} bytes, its shape and type need {size}")
    return StoredTensor(name, dtype, tuple(shape), data_start + offsets[0], size)


def _place(tensor: StoredTensor) -> tuple[int, int]:
    return tensor.offset, tensor.bytes


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for name, value in pairs:
        if name in data:
            raise HeaderError(f"{name[:80]!r} stands there twice")
        data[name] = value
    return data


def _refuse_constant(constant: str) -> Any:
    raise HeaderError(f"{constant} is no number of JSON")
