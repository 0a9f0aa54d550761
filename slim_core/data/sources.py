"""A dataset's file as blocks of bytes or lines, decompressed on the way, in memory that its size does not touch."""

from __future__ import annotations

import gzip
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import zstandard

from slim_core.data.tokens import DatasetError

FileFormat = Literal["txt", "jsonl", "parquet"]
Compression = Literal["gz", "zst"]

BLOCK_BYTES = 1 << 20
MAX_LINE_BYTES = 64 << 20
_ZSTD_INPUT_BYTES = 1 << 10
"""Four bytes can stand for a block of 128 KiB: what comes out of one call is bounded by what goes in, here 32 MiB."""
_ZSTD_WINDOW_BYTES = 128 << 20
"""The most that zstd's own tools decompress without being told to."""


@dataclass(frozen=True, slots=True)
class SourceFormat:
    """What a file's name says of it."""

    file_format: FileFormat
    compression: Compression | None

    @property
    def suffix(self) -> str:
        """Of a name, without the first dot: jsonl, txt.gz, ..."""
        return self.file_format if self.compression is None else f"{self.file_format}.{self.compression}"


def source_format(name: str) -> SourceFormat:
    """By the ending of a file's name, in capitals or not. Raises DatasetError for any other ending."""
    parts = name.lower().split(".")
    compression: Compression | None = None
    if parts[-1] in ("gz", "zst"):
        compression = "gz" if parts.pop() == "gz" else "zst"
    for known in ("txt", "jsonl", "parquet"):
        if len(parts) > 1 and parts[-1] == known:
            return SourceFormat(known, compression)
    raise DatasetError(f"{name}: must end in .txt, .jsonl or .parquet, with .gz or .zst after it if it is compressed")


def blocks(source: Path, limit_bytes: int | None = None) -> Iterator[bytes]:
    """The file's bytes, decompressed, in portions of a few MiB at most.

    Raises DatasetError for a file that is not what its name says, that ends in the middle, or that holds more than
    `limit_bytes`.
    """
    compression = source_format(source.name).compression
    total = 0
    with source.open("rb") as file:
        for block in _decompressed(file, compression):
            total += len(block)
            if limit_bytes is not None and total > limit_bytes:
                raise DatasetError(f"holds more than {limit_bytes} bytes when it is decompressed")
            yield block


def lines(source: Path, limit_bytes: int | None = None) -> Iterator[bytes | None]:
    """Without their ends; None for a line of more than MAX_LINE_BYTES. Raises DatasetError as `blocks` does."""
    pending: list[bytes] = []
    pending_bytes = 0
    for block in blocks(source, limit_bytes):
        first, *rest = block.split(b"\n")
        pending_bytes += len(first)
        if pending_bytes <= MAX_LINE_BYTES:  # else it is too long whatever follows: hold no more of it
            pending.append(first)
        if not rest:
            continue
        yield _joined(pending, pending_bytes)
        *complete, last = rest
        yield from complete
        pending.append(last)
        pending_bytes = len(last)
    if pending_bytes:
        yield _joined(pending, pending_bytes)


def seekable(source: Path, limit_bytes: int | None = None) -> BinaryIO:
    """The file, decompressed to a nameless temporary one beside it where it is compressed."""
    if source_format(source.name).compression is None:
        return source.open("rb")
    file = tempfile.TemporaryFile(dir=source.parent)  # noqa: SIM115  # the caller closes it
    try:
        for block in blocks(source, limit_bytes):
            file.write(block)
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _joined(pending: list[bytes], size: int) -> bytes | None:
    """The line, which is not held here any longer."""
    line = b"".join(pending) if size <= MAX_LINE_BYTES else None
    pending.clear()
    return line


def _decompressed(file: BinaryIO, compression: Compression | None) -> Iterator[bytes]:
    try:
        if compression == "zst":
            yield from _zstd_blocks(file)
            return
        stream = file if compression is None else gzip.GzipFile(fileobj=file)
        while block := stream.read(BLOCK_BYTES):
            yield block
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        name = "gzip" if compression == "gz" else "zstd"
        raise DatasetError(f"is not a complete {name} file: {error}") from error


def _zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    """Frame by frame: a stream reader takes a file that ends in the middle for one that ends there."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
    frame = None
    while data := file.read(_ZSTD_INPUT_BYTES):
        while data:
            frame = frame or decompressor.decompressobj()
            if block := frame.decompress(data):
                yield block
            data = b""
            if frame.eof:
                data, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("it ends in the middle")
