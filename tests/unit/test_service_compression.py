"""Decompression while a file streams."""

from __future__ import annotations

import gzip
import itertools
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from service.compression import FREE_BYTES, MAX_RATIO, Compression, decoder
from service.errors import DatasetInvalidError, UploadExpandsTooFarError

COMPRESS: dict[Compression, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "zstd": zstandard.compress}
COMPRESSIONS: list[Compression] = ["gzip", "zstd"]


def expand(compression: Compression, data: bytes, places: list[int], limit_bytes: int = 1 << 30) -> tuple[bytes, int]:
    """What a file stands for, fed in portions; and the largest block in which it came."""
    instance = decoder(compression, limit_bytes)
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    blocks = [block for start, end in itertools.pairwise(edges) for block in instance.feed(data[start:end])]
    instance.finish()
    return b"".join(blocks), max(map(len, blocks), default=0)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@given(st.lists(st.binary(max_size=5_000), min_size=1, max_size=4), st.lists(st.integers(0, 20_000), max_size=6))
def test_any_number_of_members_in_any_portions(compression: Compression, parts: list[bytes], places: list[int]) -> None:
    data = b"".join(map(COMPRESS[compression], parts))
    assert expand(compression, data, places)[0] == b"".join(parts)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@given(st.binary(min_size=1, max_size=5_000), st.integers(0, 10_000))
def test_a_file_that_ends_early_is_refused(compression: Compression, content: bytes, place: int) -> None:
    data = COMPRESS[compression](content)
    with pytest.raises(DatasetInvalidError):
        expand(compression, data[: place % len(data)], [])


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("data", [b"no archive", b"", b"\0" * 100])
def test_what_is_no_archive_is_refused(compression: Compression, data: bytes) -> None:
    with pytest.raises(DatasetInvalidError):
        expand(compression, data, [])


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_what_follows_an_archive_is_refused(compression: Compression) -> None:
    with pytest.raises(DatasetInvalidError):
        expand(compression, COMPRESS[compression](b"text") + b"more", [])


def test_the_padding_of_a_tape_is_none() -> None:
    assert expand("gzip", gzip.compress(b"text") + b"\0" * 512, [])[0] == b"text"


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_bomb_is_given_up_in_flat_memory(compression: Compression) -> None:
    data = COMPRESS[compression](bytes(256 << 20))
    assert len(data) < 300_000
    with pytest.raises(UploadExpandsTooFarError, match=f"more than {50 << 20} bytes"):
        expand(compression, data, [], limit_bytes=50 << 20)
    size, largest = 0, 0
    with pytest.raises(UploadExpandsTooFarError, match=f"more than {MAX_RATIO} times"):
        for block in decoder(compression, 1 << 40).feed(data):
            size, largest = size + len(block), max(largest, len(block))
    assert 0 < size <= max(FREE_BYTES, MAX_RATIO * len(data))
    assert largest <= 17 << 20  # all of it would be 256 MiB


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_what_repeats_itself_within_reason_is_no_bomb(compression: Compression) -> None:
    text = np.random.default_rng(0).bytes(1 << 19)
    content = b"".join(bytes([number]) * 200 for number in text)  # 100 MiB, of which gzip makes about a hundredth
    data = COMPRESS[compression](content)
    assert FREE_BYTES < len(content) < MAX_RATIO * len(data)
    assert expand(compression, data, [])[0] == content


def test_a_window_that_takes_too_much_memory_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    with pytest.raises(DatasetInvalidError) as caught:
        expand("zstd", stream.compress(zlib.compress(b"text") * 1_000) + stream.flush(), [])
    assert "--long" in caught.value.fields["problems"][0]["reason"]
