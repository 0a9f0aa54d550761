"""Documents of a dataset's file: `.jsonl`, `.txt`, `.parquet`, compressed or not (docs/formats.md).

Free of torch, numpy and tokenizers, so that a file can be checked wherever it arrives. All three kinds of document
have the same grammar as lines and as rows, and it is here.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from slim_core.data import sources
from slim_core.data.sources import MAX_LINE_BYTES, source_format
from slim_core.data.tokens import DatasetError, Problems

Kind = Literal["text", "completion", "messages"]

_COLUMNS = ("text", "prompt", "completion", "messages")
_ROWS = 64
"""Of a `.parquet` in memory at once."""


@dataclass(frozen=True, slots=True)
class TextDocument:
    """Every token has a loss."""

    line: int
    text: Iterator[str]
    """In portions: a `.txt` is never in memory as a whole. To be read before the next document is asked for."""
    kind: Kind = "text"


@dataclass(frozen=True, slots=True)
class CompletionDocument:
    """A completion, which has a loss, of a prompt, which has none."""

    line: int
    prompt: str
    completion: str
    kind: Kind = "completion"


@dataclass(frozen=True, slots=True)
class ConversationDocument:
    """The assistant's messages have a loss."""

    line: int
    messages: list[dict[str, Any]]
    """Each with `role` and `content`, and whatever else its author wrote: a chat template may read it."""
    kind: Kind = "messages"


Document = TextDocument | CompletionDocument | ConversationDocument


def read_documents(source: Path, problems: Problems, limit_bytes: int | None = None) -> Iterator[Document]:
    """The documents of a file whose name ends as its format does. What is wrong with a line or row is added to
    `problems`, and reading goes on behind it.

    Args:
        limit_bytes: the most that the decompressed file may hold.

    Raises:
        DatasetError: for what is wrong with the file as a whole.
    """
    file_format = source_format(source.name).file_format
    if file_format == "txt":
        yield TextDocument(1, _text_blocks(source, problems, limit_bytes))
        return
    records = _rows if file_format == "parquet" else _objects
    reader = _Grammar(problems)
    for line, record in records(source, problems, limit_bytes):
        if (document := reader.read(line, record)) is not None:
            yield document


def _text_blocks(source: Path, problems: Problems, limit_bytes: int | None) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = 0
    try:
        for block in sources.blocks(source, limit_bytes):
            if text := decoder.decode(block):
                newlines += text.count("\n")
                yield text
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        line = newlines + error.object[: error.start].count(b"\n") + 1
        problems.add(line, "is not valid UTF-8")


def _objects(source: Path, problems: Problems, limit_bytes: int | None) -> Iterator[tuple[int, Any]]:
    """Values of JSON lines; blank lines have none."""
    for number, line in enumerate(sources.lines(source, limit_bytes), 1):
        if line is None:
            problems.add(number, f"is longer than {MAX_LINE_BYTES} bytes")
        elif line.strip():
            try:
                value = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                problems.add(number, "is not valid UTF-8")
            except RecursionError:
                problems.add(number, "is nested too deeply")
            except json.JSONDecodeError as error:
                problems.add(number, f"is not valid JSON: {error.msg} at column {error.colno}")
            except ValueError:
                problems.add(number, "is not valid JSON: bad number")
            else:
                del line
                yield number, value


def _rows(source: Path, _problems: Problems, limit_bytes: int | None) -> Iterator[tuple[int, Any]]:
    """Rows of a `.parquet`, the columns that documents have."""
    try:
        import pyarrow as pa  # noqa: PLC0415  # an extra
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise DatasetError("reading .parquet needs the package pyarrow: pip install 'slimtune[parquet]'") from error
    try:
        with sources.seekable(source, limit_bytes) as handle:
            # Pages are read as they are needed; by default a whole row group is.
            file = parquet.ParquetFile(handle, pre_buffer=False, buffer_size=sources.BLOCK_BYTES)
            columns = [name for name in file.schema_arrow.names if name in _COLUMNS]
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (DatasetError, MemoryError):  # Arrow's own for memory is both its exception and Python's
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        raise DatasetError(f"is not a .parquet that can be read: {error}") from error
    except (pa.ArrowException, ValueError, NotImplementedError, OverflowError, LookupError) as error:
        # Text that is not UTF-8, times that Python has no object for, kinds of column that cannot be read.
        raise DatasetError(f"is not a .parquet that can be read: {error}") from error


class _Grammar:
    """Which records are documents."""

    def __init__(self, problems: Problems) -> None:
        self._problems = problems
        self._first: tuple[Kind, int] | None = None
        """Kind and line of the first document."""

    def read(self, line: int, record: Any) -> Document | None:
        """The document, or None after a problem was added."""
        try:
            document = _document(line, record)
        except _ProblemError as error:
            self._problems.add(line, str(error))
            return None
        self._first = self._first or (document.kind, line)
        kind, first_line = self._first
        if document.kind == kind:
            return document
        self._problems.add(
            line, f"is {_NAMES[document.kind]}, but line {first_line} is {_NAMES[kind]}: one kind a file"
        )
        return None


class _ProblemError(ValueError):
    """What is wrong with one record."""


_NAMES: dict[Kind, str] = {
    "text": '{"text"}',
    "completion": '{"prompt", "completion"}',
    "messages": '{"messages"}',
}


def _document(line: int, record: Any) -> Document:
    if not isinstance(record, dict):
        raise _ProblemError("is not a JSON object")
    kinds: list[Kind] = []
    if "text" in record:
        kinds.append("text")
    if "prompt" in record and "completion" in record:
        kinds.append("completion")
    if "messages" in record:
        kinds.append("messages")
    if len(kinds) > 1:
        raise _ProblemError(f"is both {_NAMES[kinds[0]]} and {_NAMES[kinds[1]]}")
    if not kinds:
        for name, other in (("prompt", "completion"), ("completion", "prompt")):
            if name in record:
                raise _ProblemError(f'has "{name}" but no "{other}"')
        raise _ProblemError('has no "text", no "prompt" with "completion", and no "messages"')
    if kinds[0] == "text":
        return TextDocument(line, iter([_string(record, "text")]))
    if kinds[0] == "completion":
        return CompletionDocument(line, _string(record, "prompt"), _string(record, "completion"))
    return ConversationDocument(line, _messages(record["messages"]))


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise _ProblemError('"messages" is not a list of messages, or it is empty')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise _ProblemError(f"message {number} is not an object")
        for name in ("role", "content"):
            _string(message, name, f"message {number}: ")
    return messages


def _string(record: dict[str, Any], name: str, where: str = "") -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise _ProblemError(f'{where}"{name}" is missing' if name not in record else f'{where}"{name}" is no string')
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise _ProblemError(f'{where}"{name}" has half of a surrogate pair') from error
    return value
