"""Documents of dataset files: every kind, every wrapping, and every line that is none."""

from __future__ import annotations

import gzip
import itertools
import json
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from slim_core.data import sources
from slim_core.data.readers import CompletionDocument, ConversationDocument, TextDocument, read_documents
from slim_core.data.sources import SourceFormat, source_format
from slim_core.data.tokens import DatasetError, Problem, Problems

Plain = str | tuple[str, str] | list[dict[str, Any]]

WRAPPINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def read(source: Path, limit_bytes: int | None = None) -> tuple[list[Plain], Problems]:
    """The documents' contents, and what is wrong with the others."""
    problems = Problems()
    contents: list[Plain] = []
    for document in read_documents(source, problems, limit_bytes):
        match document:
            case TextDocument():
                contents.append("".join(document.text))
            case CompletionDocument():
                contents.append((document.prompt, document.completion))
            case ConversationDocument():
                contents.append(document.messages)
    return contents, problems


def written(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / name
    path.write_bytes(content)
    return path


def problems_of(folder: Path, *lines: str | bytes, name: str = "data.jsonl") -> list[tuple[int, str]]:
    content = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    _, problems = read(written(folder, name, content))
    assert problems.total == len(problems.first)
    return [(problem.line, problem.reason) for problem in problems.first]


MESSAGES = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4", "thinking": "…"}]
RECORDS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": "one\n☃", "id": 7}, {"text": ""}, {"text": "three"}],
    "completion": [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "", "completion": "☃"}],
    "messages": [{"messages": MESSAGES}, {"messages": MESSAGES[:1]}],
}


def contents_of(kind: str) -> list[Plain]:
    if kind == "completion":
        return [(record["prompt"], record["completion"]) for record in RECORDS[kind]]
    return [record[kind] for record in RECORDS[kind]]


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_lines_and_rows_of_every_kind(kind: str, wrapping: str, tmp_path: Path) -> None:
    lines = "\n\n  \r\n".join(json.dumps(record) for record in RECORDS[kind])
    table = tmp_path / "table"
    parquet.write_table(pa.Table.from_pylist(RECORDS[kind]), table)
    for name, content in (("data.jsonl", lines.encode()), ("data.parquet", table.read_bytes())):
        source = written(tmp_path, name + wrapping, WRAPPINGS[wrapping](content))
        found, problems = read(source)
        assert problems.total == 0
        if kind == "messages" and name == "data.parquet":  # a column has one type: the key is in every row
            found = [[{k: v for k, v in m.items() if v is not None} for m in row] for row in found]  # type: ignore[union-attr]
        assert found == contents_of(kind)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_text_file_is_one_document_in_blocks(wrapping: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 5)
    text = "naïve ☃\n\nsecond line 🙂\n"
    source = written(tmp_path, "DATA.TXT" + wrapping, WRAPPINGS[wrapping](text.encode()))
    (document,) = read_documents(source, Problems())
    assert isinstance(document, TextDocument)
    blocks = list(document.text)
    assert "".join(blocks) == text
    assert len(blocks) > 3 or wrapping == ".zst"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json", "is not valid JSON: Expecting value at column 1"),
        ('{"text": "cut', "is not valid JSON: Unterminated string starting at at column 10"),
        ('{"text": 1' + "0" * 5000 + "}", "is not valid JSON: bad number"),
        ("[" * 100_000, "is nested too deeply"),
        ('["text"]', "is not a JSON object"),
        ("{}", 'has no "text", no "prompt" with "completion", and no "messages"'),
        ('{"text": null}', '"text" is no string'),
        (b'{"text": "\xff"}', "is not valid UTF-8"),
        ('{"text": "\\ud800"}', '"text" has half of a surrogate pair'),
        ('{"prompt": "p"}', 'has "prompt" but no "completion"'),
        ('{"completion": "c"}', 'has "completion" but no "prompt"'),
        ('{"prompt": "p", "completion": 3}', '"completion" is no string'),
        ('{"text": "t", "messages": []}', 'is both {"text"} and {"messages"}'),
        ('{"messages": []}', '"messages" is not a list of messages, or it is empty'),
        ('{"messages": ["hello"]}', "message 1 is not an object"),
        ('{"messages": [{"role": "user"}]}', 'message 1: "content" is missing'),
        ('{"messages": [{"role": 1, "content": ""}]}', 'message 1: "role" is no string'),
    ],
)
def test_a_line_that_is_no_document_is_named(line: str | bytes, reason: str, tmp_path: Path) -> None:
    assert problems_of(tmp_path, "", line, "") == [(2, reason)]


def test_a_file_has_one_kind(tmp_path: Path) -> None:
    completion = '{"prompt": "p", "completion": "c"}'
    assert problems_of(tmp_path, "no json", '{"text": "t"}', completion, '{"text": "t"}') == [
        (1, "is not valid JSON: Expecting value at column 1"),
        (3, 'is {"prompt", "completion"}, but line 2 is {"text"}: one kind a file'),
    ]


def test_all_problems_are_counted_and_twenty_listed(tmp_path: Path) -> None:
    _, problems = read(written(tmp_path, "data.jsonl", b"?\n" * 30))
    assert problems.total == 30
    assert [problem.line for problem in problems.first] == list(range(1, 21))
    with pytest.raises(DatasetError, match=r"line 1: is not valid JSON.*\(and 29 more\)") as caught:
        problems.raise_if_any()
    assert caught.value.total_problems == 30
    assert caught.value.problems[1] == Problem(2, "is not valid JSON: Expecting value at column 1")


def test_rows_have_their_numbers(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"text": "a"}, {"text": None}, {"text": "c"}])
    parquet.write_table(table, tmp_path / "data.parquet")
    contents, problems = read(tmp_path / "data.parquet")
    assert contents == ["a", "c"]
    assert problems.first == [Problem(2, '"text" is no string')]


@given(st.binary(max_size=40), st.integers(1, 7))
def test_the_line_of_a_bad_byte_does_not_depend_on_blocks(head: bytes, block: int) -> None:
    text = head.replace(b"\xff", b"").decode("utf-8", "ignore").encode()
    with pytest.MonkeyPatch.context() as patch, _folder() as folder:
        patch.setattr(sources, "BLOCK_BYTES", block)
        assert problems_of(folder, text + b"\xff\n\xff", name="data.txt") == [
            (text.count(b"\n") + 1, "is not valid UTF-8")
        ]
        assert problems_of(folder, text + b"\xe2\x82", name="data.txt") == [
            (text.count(b"\n") + 1, "is not valid UTF-8")
        ]


@contextmanager
def _folder() -> Iterator[Path]:
    """For examples that share a test's own."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@given(st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=8), st.integers(1, 9))
def test_lines_do_not_depend_on_blocks(content: list[bytes], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch, _folder() as folder:
        patch.setattr(sources, "BLOCK_BYTES", block)
        patch.setattr(sources, "MAX_LINE_BYTES", 8)
        source = written(folder, "data.jsonl", b"\n".join(content))
        wanted = [line if len(line) <= 8 else None for line in content]
        assert list(sources.lines(source)) == list(_without_empty_end(wanted))


def _without_empty_end(lines: list[bytes | None]) -> list[bytes | None]:
    return lines[:-1] if lines and lines[-1] == b"" else lines


def test_a_line_that_is_too_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 16)
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 40)
    problems = problems_of(tmp_path, '{"text": "a"}', '{"text": "' + "b" * 60 + '"}', '{"text": "c"}')
    assert [line for line, _ in problems] == [2]


@pytest.mark.parametrize("wrapping", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["data.jsonl", "data.txt"])
def test_what_is_compressed_is_complete_or_refused(wrapping: str, name: str, tmp_path: Path) -> None:
    whole = WRAPPINGS[wrapping](json.dumps({"text": "words " * 50_000}).encode())
    for broken in (whole[:-5], whole[: len(whole) // 2], b"no archive", whole + b"rubbish behind it"):
        with pytest.raises(DatasetError, match=r"is not a complete (gzip|zstd) file"):
            read(written(tmp_path, name + wrapping, broken))
    two = written(tmp_path, "data.jsonl" + wrapping, whole + WRAPPINGS[wrapping](b"\n" + b'{"text": "more"}'))
    contents, problems = read(two)
    assert (len(contents), problems.total) == (2, 0)


@pytest.mark.parametrize("wrapping", [".gz", ".zst"])
def test_a_bomb_is_stopped_at_the_limit(wrapping: str, tmp_path: Path) -> None:
    source = written(tmp_path, "data.txt" + wrapping, WRAPPINGS[wrapping](bytes(1 << 28)))
    largest = 0
    with pytest.raises(DatasetError, match="holds more than 100000000 bytes"):
        for block in sources.blocks(source, 100_000_000):
            largest = max(largest, len(block))
    assert 0 < largest <= 33 << 20


def test_a_table_that_is_none(tmp_path: Path) -> None:
    for name, content in (("data.parquet", b"PAR1 no table PAR1"), ("data.parquet.gz", gzip.compress(b"nothing"))):
        with pytest.raises(DatasetError, match=r"is not a \.parquet that can be read"):
            read(written(tmp_path, name, content))


def test_parquet_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DatasetError, match=r"pip install 'slimtune\[parquet\]'"):
        read(written(tmp_path, "data.parquet", b""))


def test_names_say_what_a_file_is() -> None:
    formats, compressions = ("txt", "jsonl", "parquet"), (None, "gz", "zst")
    for file_format, compression in itertools.product(formats, compressions):
        wanted = SourceFormat(file_format, compression)  # type: ignore[arg-type]
        assert source_format(f"My.Data.{wanted.suffix.upper()}") == wanted
    for name in ("data", "data.csv", "data.gz", "txt", "data.txt.bz2", ".gz", "data.gz.txt.zst.zst"):
        with pytest.raises(DatasetError, match=r"must end in \.txt, \.jsonl or \.parquet"):
            source_format(name)


def test_a_column_that_python_has_no_objects_for(tmp_path: Path) -> None:
    text = pa.StringArray.from_buffers(1, pa.py_buffer(struct.pack("<2i", 0, 1)), pa.py_buffer(b"\xff"))
    for column in (text, pa.array([2**62], pa.timestamp("us"))):
        parquet.write_table(pa.table({"text": column}), tmp_path / "data.parquet")
        with pytest.raises(DatasetError, match=r"is not a \.parquet that can be read"):
            read(tmp_path / "data.parquet")
