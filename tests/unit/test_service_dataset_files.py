"""Validation of dataset files while they stream."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterable

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from service import dataset_files
from service.compression import Compression
from service.dataset_files import DatasetCounts, DatasetFormat, reader
from service.errors import DatasetInvalidError, UploadTakesTooLongError

LIMIT_BYTES = 1 << 30


def read(file_format: DatasetFormat, *portions: bytes) -> DatasetCounts:
    instance = reader(file_format, None, LIMIT_BYTES)
    for portion in portions:
        instance.feed(portion)
    return instance.finish()


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def problems_of(file_format: DatasetFormat, *portions: bytes) -> tuple[list[tuple[int, str]], int]:
    with pytest.raises(DatasetInvalidError) as caught:
        read(file_format, *portions)
    fields = caught.value.fields
    return [(problem["line"], problem["reason"]) for problem in fields["problems"]], fields["total_problems"]


texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), min_size=1, max_size=6)


@given(texts, st.lists(st.integers(0, 10_000), max_size=6), st.booleans())
def test_jsonl_counts_do_not_depend_on_how_the_bytes_arrive(
    documents: list[str], places: list[int], escaped: bool
) -> None:
    lines = [json.dumps({"text": text, "id": number}, ensure_ascii=escaped) for number, text in enumerate(documents)]
    sizes = [len(text.encode()) + 1 for text in documents]
    counts = read("jsonl", *cut("\n".join(lines).encode(), places))
    assert counts == DatasetCounts("text", len(documents), sum(sizes), max(sizes))


@given(st.text(min_size=1, max_size=50), st.lists(st.integers(0, 1_000), max_size=6))
def test_a_txt_file_is_one_document_of_its_bytes(text: str, places: list[int]) -> None:
    data = text.encode("utf-8")
    assert read("txt", *cut(data, places)) == DatasetCounts("text", 1, len(data) + 1, len(data) + 1)


def test_a_bad_byte_in_a_txt_file_is_reported_by_its_line_even_across_portions() -> None:
    assert problems_of("txt", b"one\ntw", b"o\n\xe2\x82", b"x\nfour") == ([(3, "is not valid UTF-8")], 1)
    assert problems_of("txt", b"one\n\xe2\x82") == ([(2, "is not valid UTF-8")], 1)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"[1]", "is not a JSON object"),
        (b'{"txt": "a"}', 'has no "text", or one that is not a string'),
        (b'{"text": 5}', 'has no "text", or one that is not a string'),
        (b'{"text": "a"', "is not valid JSON: Expecting ',' delimiter at column 13"),
        (b'{"text": "\xff"}', "is not valid UTF-8"),
        (b'{"text": "\\ud800"}', "has half of a surrogate pair in a text"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"prompt": "a", "completion": "b"}', "is prompt_completion; the lines before it are text"),
        (b'{"text": "a", "messages": []}', "is messages; the lines before it are text"),
        (b'{"text": "a", "prompt": "b", "completion": "c"}', 'has both "text" and "prompt" with "completion"'),
        (b'{"n": ' + b"9" * 5_000 + b"}", "is not valid JSON: bad number"),
    ],
)
def test_a_broken_line_is_named_with_its_reason(line: bytes, reason: str) -> None:
    assert problems_of("jsonl", b'{"text": "fine"}\n\n', line, b'\n{"text": "fine"}\n') == ([(3, reason)], 1)


def test_the_first_twenty_problems_are_listed_and_all_are_counted() -> None:
    problems, total = problems_of("jsonl", b"no\n" * 50)
    assert [line for line, _ in problems] == list(range(1, 21))
    assert total == 50


def test_a_line_over_the_limit_is_refused_and_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_files, "MAX_LINE_BYTES", 30)
    assert read("jsonl", b'{"text": "0123456789 012345"}\n').tokens == 18
    instance = dataset_files.JsonLinesReader()
    for _ in range(1_000):
        instance.feed(b"0123456789")
    assert sum(map(len, instance._pending)) <= 30
    instance.feed(b'\n{"text": "fine"}')
    with pytest.raises(DatasetInvalidError) as caught:
        instance.finish()
    assert caught.value.fields["problems"] == [{"line": 1, "reason": "is longer than 30 bytes"}]


@pytest.mark.parametrize(
    ("file_format", "data"), [("txt", b""), ("jsonl", b""), ("jsonl", b"\n \r\n"), ("jsonl", b'{"text": ""}\n')]
)
def test_a_file_without_text_is_refused(file_format: DatasetFormat, data: bytes) -> None:
    assert problems_of(file_format, data) == ([(1, "the file holds no text")], 1)


def test_windows_line_ends_and_blank_lines_are_no_documents() -> None:
    assert read("jsonl", b'{"text": "ab"}\r\n\r\n{"text": "c"}\r\n') == DatasetCounts("text", 2, 5, 3)


@pytest.mark.parametrize("compression", ["gzip", "zstd", None])
def test_a_file_that_takes_too_long_is_given_up_at_once(
    compression: Compression | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second for each block that the file stands for, of which it has many more than it may take seconds."""
    clock = itertools.count()
    monkeypatch.setattr(dataset_files, "thread_time", lambda: float(next(clock)))
    read_blocks: list[None] = []
    instance = reader("txt", compression, LIMIT_BYTES, 3.0, lambda: read_blocks.append(None))
    data = bytes(32 << 20)
    portions = {"gzip": [gzip.compress(data)], "zstd": [zstandard.compress(data)], None: [b"x"] * 32}[compression]
    with pytest.raises(UploadTakesTooLongError) as caught:
        for portion in portions * 2:
            instance.feed(portion)
            assert len(read_blocks) <= 3
    assert len(read_blocks) <= 3
    assert caught.value.fields["max_read_seconds"] == 3.0
