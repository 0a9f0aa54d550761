"""Decompression of a file as it arrives: bounded memory, whatever the file claims to expand to."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Literal, Protocol

import zstandard

from service.errors import DatasetInvalidError, UploadExpandsTooFarError

Compression = Literal["gzip", "zstd"]

BLOCK_BYTES = 1 << 20
MAX_RATIO = 256
"""A file of any size may expand to `FREE_BYTES`, and to so many times its own: more than text does that says anything.
Two megabytes of zstd can stand for 64 GiB, which take minutes to be read."""
FREE_BYTES = 64 << 20
_GZIP_HEADER = 31
"""zlib's number for a gzip stream with the largest window."""
_ZSTD_WINDOW_BYTES = 8 << 20
"""What every level up to 19 needs at most. --ultra and --long ask their reader for up to 2 GiB."""
_ZSTD_PORTION_BYTES = 512
"""zstandard expands all that it is given: a block of 4 bytes may stand for 128 KiB, so these for 16 MiB at most."""


class Decoder(Protocol):
    """Takes a file's bytes in any portions and gives those that it stands for, in blocks."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Raises DatasetInvalidError, UploadExpandsTooFarError."""
        ...

    def finish(self) -> None:
        """Raises DatasetInvalidError where the file ends in the middle."""
        ...


def decoder(compression: Compression | None, limit_bytes: int) -> Decoder:
    """A decoder that refuses to expand to more than `limit_bytes`."""
    match compression:
        case None:
            return PlainDecoder()
        case "gzip":
            return GzipDecoder(limit_bytes)
        case "zstd":
            return ZstdDecoder(limit_bytes)


class PlainDecoder:
    """For a file that is not compressed: its size has a limit of its own."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        yield data

    def finish(self) -> None:
        pass


class _Limited:
    """Counts what goes in and what comes out."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._taken_bytes = 0
        self._expanded_bytes = 0

    def _counted(self, block: bytes) -> bytes:
        self._expanded_bytes += len(block)
        if self._expanded_bytes > self._limit_bytes:
            raise UploadExpandsTooFarError(self._limit_bytes)
        if self._expanded_bytes > max(FREE_BYTES, MAX_RATIO * self._taken_bytes):
            raise UploadExpandsTooFarError(self._limit_bytes, MAX_RATIO)
        return block


class GzipDecoder(_Limited):
    """RFC 1952, any number of members."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(limit_bytes)
        self._member = zlib.decompressobj(_GZIP_HEADER)
        self._begun = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._taken_bytes += len(data)
        while data:
            if self._member.eof:
                if not (data := data.lstrip(b"\0")):  # padding, as tapes have it
                    return
                self._member = zlib.decompressobj(_GZIP_HEADER)
            self._begun = True
            try:
                block = self._member.decompress(data, BLOCK_BYTES)
            except zlib.error as error:
                raise _broken("gzip", str(error)) from error
            data = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            yield self._counted(block)
            # What fits into zlib's own buffer comes out with the next input, or here.
            while not data and not self._member.eof and len(block) == BLOCK_BYTES:
                block = self._member.decompress(b"", BLOCK_BYTES)
                yield self._counted(block)

    def finish(self) -> None:
        if not (self._begun and self._member.eof):
            raise _broken("gzip", "it ends too early")


class ZstdDecoder(_Limited):
    """RFC 8878, any number of frames."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(limit_bytes)
        self._frame = self._next_frame()
        self._begun = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        view = memoryview(data)
        for start in range(0, len(view), _ZSTD_PORTION_BYTES):
            portion = bytes(view[start : start + _ZSTD_PORTION_BYTES])
            self._taken_bytes += len(portion)
            while portion:
                if self._frame.eof:
                    self._frame = self._next_frame()
                self._begun = True
                try:
                    block = self._frame.decompress(portion)
                except zstandard.ZstdError as error:
                    raise _broken("zstd", _reason(error)) from error
                portion = self._frame.unused_data if self._frame.eof else b""
                yield self._counted(block)

    def finish(self) -> None:
        if not (self._begun and self._frame.eof):
            raise _broken("zstd", "it ends too early")

    def _next_frame(self) -> zstandard.ZstdDecompressionObj:
        return zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()


def _reason(error: zstandard.ZstdError) -> str:
    if "memory" in str(error):
        return f"its window is larger than {_ZSTD_WINDOW_BYTES} bytes: compress it without --ultra and --long"
    return str(error)


def _broken(compression: Compression, reason: str) -> DatasetInvalidError:
    message = f"The file is not valid {compression}; nothing was stored."
    return DatasetInvalidError(message, [{"line": None, "reason": f"is not valid {compression}: {reason}"}], 1)
