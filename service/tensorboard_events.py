"""TensorBoard's event files, written without TensorBoard: scalars of steps, and a text.

A file is a sequence of TFRecords (length, its CRC, data, its CRC: tensorflow/core/lib/io/record_writer.h), each with
one `Event` in protobuf's wire format (tensorflow/core/util/event.proto, tensorflow/core/framework/summary.proto). The
CRC is CRC-32C (Castagnoli, RFC 3720 appendix B.4), rotated and offset, which is what "masked" means there.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping

_POLYNOMIAL = 0x82F63B78
"""Castagnoli's, bits reversed."""
_MASK_DELTA = 0xA282EAD8
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types."""
_DT_STRING = 7
_TEXT_PLUGIN = "text"


def _table_of(polynomial: int) -> tuple[int, ...]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (polynomial if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


_TABLE = _table_of(_POLYNOMIAL)


def crc32c(data: bytes) -> int:
    """CRC-32C."""
    crc, table = 0xFFFF_FFFF, _TABLE
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFF_FFFF


def masked(crc: int) -> int:
    """The CRC as a TFRecord has it."""
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFF_FFFF


def record(data: bytes) -> bytes:
    """A TFRecord."""
    length = struct.pack("<Q", len(data))
    return b"".join((length, _checksum(length), data, _checksum(data)))


def header(wall_time: float) -> bytes:
    """The first record of a file, which names the format's version. Times are seconds since 1970."""
    return record(_double(1, wall_time) + _text(3, "brain.Event:2"))


def scalars(wall_time: float, step: int, values: Mapping[str, float]) -> bytes:
    """A record with the scalars of a step, by tag. TensorBoard keeps them as 32-bit floats."""
    summary = b"".join(_before_value(tag) + _float32(value) for tag, value in values.items())
    return record(_double(1, wall_time) + _integer(2, step) + _message(5, summary))


def text(wall_time: float, tag: str, markdown: str) -> bytes:
    """A record with a text for TensorBoard's page of texts."""
    shape = _message(2, _integer(1, 1))  # one dimension of size 1
    tensor = _integer(1, _DT_STRING) + _message(2, shape) + _text(8, markdown)
    metadata = _message(1, _text(1, _TEXT_PLUGIN))
    value = _text(1, tag) + _message(8, tensor) + _message(9, metadata)
    return record(_double(1, wall_time) + _message(5, _message(1, value)))


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", masked(crc32c(data)))


def _key(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _varint(value: int) -> bytes:
    """Of a number that is not negative."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _integer(field: int, value: int) -> bytes:
    return _key(field, _VARINT) + _varint(value)


def _double(field: int, value: float) -> bytes:
    return _key(field, _FIXED64) + struct.pack("<d", value)


@functools.lru_cache(maxsize=64)
def _before_value(tag: str) -> bytes:
    """All of a scalar in a summary but its last 4 bytes: the same for every step, and most of the work."""
    return _message(1, _text(1, tag) + _key(2, _FIXED32) + bytes(4))[:-4]


def _float32(value: float) -> bytes:
    """What is beyond the range of 32 bits becomes infinite."""
    try:
        return struct.pack("<f", value)
    except OverflowError:
        return struct.pack("<f", float("inf") if value > 0 else float("-inf"))


def _message(field: int, content: bytes) -> bytes:
    return _key(field, _BYTES) + _varint(len(content)) + content


def _text(field: int, content: str) -> bytes:
    return _message(field, content.encode())
