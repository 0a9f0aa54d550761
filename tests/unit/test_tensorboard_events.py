"""Files of events: the checksum by known answers, the framing and the fields by bytes. That TensorBoard reads them is
tested in tests/extra."""

from __future__ import annotations

import struct

import pytest

from service import tensorboard_events
from service.tensorboard_events import crc32c, masked


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        # RFC 3720, appendix B.4
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (bytes.fromhex("01c00000 00000000 00000000 00000000 14000000 00000400 00000014 00000018 28000000 00000000"
                       "02000000 00000000".replace(" ", "")), 0xD9963A56),
        (b"123456789", 0xE3069283),  # the check value of the catalogues of CRCs
        (b"", 0),
    ],
)  # fmt: skip
def test_the_checksum_is_castagnolis(data: bytes, crc: int) -> None:
    assert crc32c(data) == crc


def test_a_record_is_framed_as_in_every_file_of_events() -> None:
    assert masked(crc32c(bytes(32))) == ((0x8A9136AA >> 15 | 0x8A9136AA << 17) + 0xA282EAD8) & 0xFFFFFFFF
    # The first record of a file that TensorFlow wrote: its length, the checksum of that, and an event that begins so.
    data = tensorboard_events.header(1_500_000_000.0)
    assert data[:12] == struct.pack("<QI", 24, masked(crc32c(struct.pack("<Q", 24))))
    assert data[12:21] == b"\x09" + struct.pack("<d", 1_500_000_000.0)
    assert data[21:36] == b"\x1a\x0dbrain.Event:2"
    assert struct.unpack("<I", data[36:])[0] == masked(crc32c(data[12:36]))


def test_the_fields_of_a_step() -> None:
    data = tensorboard_events.scalars(2.0, 300, {"loss": 0.5})[12:-4]
    value = b"\x0a\x04loss" + b"\x15" + struct.pack("<f", 0.5)
    summary = b"\x0a" + bytes([len(value)]) + value
    assert data == b"\x09" + struct.pack("<d", 2.0) + b"\x10\xac\x02" + b"\x2a" + bytes([len(summary)]) + summary


def test_what_32_bits_cannot_hold_is_infinite() -> None:
    assert struct.pack("<f", float("inf")) in tensorboard_events.scalars(2.0, 1, {"loss": 1e300})
