"""Reading and writing safetensors piece by piece, and making files durable."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from slim_core.weights.header import HeaderError, StoredTensor, header_bytes

_BLOCK_BYTES = 1 << 20
"""Read at a time to hash a file or to fill a tensor; two of these exist at once."""
_MODE = 0o644
"""Whatever the umask is: another process serves the files."""

DTYPE_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
"""In the words of safetensors."""
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """A file of a checkpoint."""

    name: str
    """Relative to the folder; of a file in a folder within it `folder/name`."""
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Pieces:
    """A tensor to be written that need not exist as a whole."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Iterable[Tensor]
    """Its numbers in their order."""


def read_tensor(file: BinaryIO, stored: StoredTensor) -> Iterator[tuple[int, Tensor]]:
    """A tensor of an open file, some rows at a time: the first row's number and (rows, ...); at once, number 0, where
    it has no rows. A piece lives until the next one is asked for.

    Read and not mapped: the meter of a process under a cap cannot tell pages of a file that is mapped for a while from
    the process's own. Raises OSError, EOFError for a file that is too short by now, HeaderError for a type that
    no model has.
    """
    dtype = _DTYPES.get(stored.dtype)
    if dtype is None:
        raise HeaderError(f"{stored.name!r} is of type {stored.dtype}")
    rows = stored.shape[0] if stored.shape else 1
    row_bytes = stored.bytes // max(rows, 1)
    count = max(1, _BLOCK_BYTES // max(row_bytes, 1))
    buffer = bytearray(min(count, rows) * row_bytes)
    file.seek(stored.offset)
    for first in range(0, rows, count):
        part = memoryview(buffer)[: min(count, rows - first) * row_bytes]
        if file.readinto(part) < len(part):  # type: ignore[attr-defined]  # of a file that was opened for reading
            raise EOFError(f"{stored.name!r} ends too early")
        numbers = torch.frombuffer(part, dtype=dtype) if len(part) else torch.empty(0, dtype=dtype)
        yield first, numbers.view(-1, *stored.shape[1:]) if stored.shape else numbers.view(())


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor | Pieces], *, metadata: Mapping[str, str] | None = None
) -> None:
    """A safetensors file. safetensors itself wants all tensors at once, in memory."""
    entries = {name: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    names, header = header_bytes(entries, metadata)
    with path.open("wb") as file:
        file.write(header)
        for name in names:
            tensor = tensors[name]
            for piece in tensor.pieces if isinstance(tensor, Pieces) else (tensor,):
                file.write(piece.detach().cpu().flatten().view(torch.uint8).numpy().data)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Indented, for people."""
    path.write_text(json.dumps(data, indent=2) + "\n")


def seal(folder: Path) -> list[CheckpointFile]:
    """Every file in `folder`, and in folders within it: readable by others, on disk, hashed; sorted by name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [seal_file(path, folder) for path in paths]
    for path in folder.iterdir():
        if path.is_dir():
            path.chmod(_MODE | 0o111)
            sync(path)
    return files


def seal_file(path: Path, folder: Path) -> CheckpointFile:
    """One file, likewise."""
    path.chmod(_MODE)
    sync(path)
    return CheckpointFile(path.relative_to(folder).as_posix(), path.stat().st_size, sha256(path))


def sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Put a file or folder on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
