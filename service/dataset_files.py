"""Reading a dataset's file as it arrives: validation and counts in flat memory.

`.txt` is one document. `.jsonl` has one document a line, in one of three kinds: {"text": str}, {"prompt": str,
"completion": str} or {"messages": [{"role": str, "content": str}, ...]}; that of the first line is the file's. Other
keys are ignored, blank lines skipped. Both may be compressed (`.gz`, `.zst`). Tokens are counted under the byte
tokenizer where they are the text's bytes and one border a document. A `.parquet` cannot be read before it is there: the
preparer checks it (preparations.py).
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from time import thread_time
from typing import Any, Literal, Protocol

from service.compression import Compression, Decoder, decoder
from service.errors import DatasetFormatError, DatasetInvalidError, UploadTakesTooLongError

DatasetFormat = Literal["txt", "jsonl", "parquet"]
DATASET_FORMATS: tuple[DatasetFormat, ...] = ("txt", "jsonl", "parquet")
DatasetKind = Literal["text", "prompt_completion", "messages"]

MAX_LINE_BYTES = 16 * 1024**2
"""Of a line that is parsed, here in the API's own process: one of brackets alone takes 26 times as much memory."""
MAX_PROBLEMS = 20
PARQUET_MAGIC = b"PAR1"
_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES: dict[Compression, str] = {compression: suffix for suffix, compression in _COMPRESSIONS.items()}


@dataclass(slots=True)
class DatasetCounts:
    """What a file holds; None where it takes the tokenizer, or the whole file, to know."""

    kind: DatasetKind | None = None
    documents: int | None = 0
    tokens: int | None = 0
    longest_document_tokens: int | None = 0


class DatasetReader(Protocol):
    """Takes the bytes of a file in any portions, then says what they held."""

    def feed(self, data: bytes) -> None:
        """Raises DatasetInvalidError, UploadExpandsTooFarError, UploadTakesTooLongError where it makes no sense to read
        on."""
        ...

    def finish(self) -> DatasetCounts:
        """Raises DatasetInvalidError."""
        ...


def format_of(filename: str) -> tuple[DatasetFormat, Compression | None]:
    """Format and compression by the endings of a file's name. Raises DatasetFormatError."""
    lowered = filename.lower()
    compression = next((value for ending, value in _COMPRESSIONS.items() if lowered.endswith(ending)), None)
    stem = lowered if compression is None else lowered.removesuffix(SUFFIXES[compression])
    for file_format in DATASET_FORMATS:
        if stem.endswith(f".{file_format}"):
            return file_format, compression
    raise DatasetFormatError


def reader(
    file_format: DatasetFormat,
    compression: Compression | None,
    limit_bytes: int,
    limit_seconds: float = math.inf,
    meanwhile: Callable[[], None] = lambda: None,
) -> DatasetReader:
    """For a file that may expand to at most `limit_bytes`, and take a processor at most `limit_seconds`. `meanwhile` is
    called after each block, of at most 16 MiB, of what the file stands for."""
    match file_format:
        case "txt":
            plain: DatasetReader = TextReader()
        case "jsonl":
            plain = JsonLinesReader()
        case "parquet":
            plain = ParquetReader()
    return FileReader(decoder(compression, limit_bytes), plain, limit_seconds, meanwhile)


@dataclass(slots=True)
class _Problems:
    first: list[dict[str, Any]] = field(default_factory=list)
    total: int = 0

    def add(self, line: int, reason: str) -> None:
        self.total += 1
        if len(self.first) < MAX_PROBLEMS:
            self.first.append({"line": line, "reason": reason})

    def raise_if_any(self) -> None:
        if self.total:
            lines = "1 line is" if self.total == 1 else f"{self.total} lines are"
            raise DatasetInvalidError(f"{lines} not valid; nothing was stored.", self.first, self.total)


class FileReader:
    """A file, compressed or not, as the reader of what it stands for sees it, and no longer than it may take.

    A few megabytes can stand for gigabytes, and lines of some bytes are read at 2 MB/s. What counts is the time of the
    processor: how fast the client sends, and what else the machine does, refuses no file.
    """

    def __init__(
        self, decoder: Decoder, plain: DatasetReader, limit_seconds: float, meanwhile: Callable[[], None]
    ) -> None:
        self._decoder = decoder
        self._plain = plain
        self._limit_seconds = limit_seconds
        self._meanwhile = meanwhile
        self._seconds = 0.0

    def feed(self, data: bytes) -> None:
        since = thread_time()  # of this thread: each portion may be another's
        for block in self._decoder.feed(data):
            self._plain.feed(block)
            now = thread_time()
            self._seconds, since = self._seconds + now - since, now
            if self._seconds > self._limit_seconds:
                raise UploadTakesTooLongError(self._limit_seconds)
            self._meanwhile()

    def finish(self) -> DatasetCounts:
        self._decoder.finish()
        return self._plain.finish()


class ParquetReader:
    """Whether it can be a parquet file at all."""

    def __init__(self) -> None:
        self._head = b""
        self._tail = b""

    def feed(self, data: bytes) -> None:
        self._head = (self._head + data[: len(PARQUET_MAGIC)])[: len(PARQUET_MAGIC)]
        self._tail = (self._tail + data[-len(PARQUET_MAGIC) :])[-len(PARQUET_MAGIC) :]

    def finish(self) -> DatasetCounts:
        if (self._head, self._tail) != (PARQUET_MAGIC, PARQUET_MAGIC):
            problem = {"line": None, "reason": "does not begin and end as a parquet file"}
            raise DatasetInvalidError("The file is not valid parquet; nothing was stored.", [problem], 1)
        return DatasetCounts(None, None, None, None)


class TextReader:
    """One document, any UTF-8. Reports the line of the first byte that is not."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._bytes = 0
        self._newlines = 0
        self._problems = _Problems()

    def feed(self, data: bytes) -> None:
        self._bytes += len(data)
        self._decode(data)

    def finish(self) -> DatasetCounts:
        self._decode(b"", final=True)
        self._problems.raise_if_any()
        if self._bytes == 0:
            raise _empty()
        return DatasetCounts("text", 1, self._bytes + 1, self._bytes + 1)

    def _decode(self, data: bytes, final: bool = False) -> None:
        if self._problems.total:
            return
        try:
            self._newlines += self._decoder.decode(data, final).count("\n")
        except UnicodeDecodeError as error:
            line = self._newlines + error.object[: error.start].count(b"\n") + 1
            self._problems.add(line, "is not valid UTF-8")


class JsonLinesReader:
    """One JSON object a line. Holds one line at a time, of at most 16 MiB."""

    def __init__(self) -> None:
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._line = 1
        self._kind: DatasetKind | None = None
        self._documents = 0
        self._text_bytes = 0
        self._longest_bytes = 0
        self._problems = _Problems()

    def feed(self, data: bytes) -> None:
        *complete, rest = data.split(b"\n")
        for part in complete:
            self._append(part)
            self._end_line()
        self._append(rest)

    def finish(self) -> DatasetCounts:
        self._end_line()
        self._problems.raise_if_any()
        if self._text_bytes == 0:
            raise _empty()
        if self._kind != "text":
            return DatasetCounts(self._kind, self._documents, None, None)
        return DatasetCounts("text", self._documents, self._text_bytes + self._documents, self._longest_bytes + 1)

    def _append(self, part: bytes) -> None:
        self._pending_bytes += len(part)
        if part and self._pending_bytes <= MAX_LINE_BYTES:  # else it is too long whatever follows: hold no more of it
            self._pending.append(part)

    def _end_line(self) -> None:
        if self._pending_bytes > MAX_LINE_BYTES:
            self._problems.add(self._line, f"is longer than {MAX_LINE_BYTES} bytes")
        else:
            line = b"".join(self._pending).strip()
            if line:
                self._read(line)
        self._pending.clear()
        self._pending_bytes = 0
        self._line += 1

    def _read(self, line: bytes) -> None:
        try:
            value = json.loads(line.decode("utf-8"))
            if not isinstance(value, dict):
                return self._problems.add(self._line, "is not a JSON object")
            kind = _kind_of(value)
            texts = (
                _TEXTS[kind](value)
                if self._kind in (None, kind)
                else f"is {kind}; the lines before it are {self._kind}"
            )
            if isinstance(texts, str):
                return self._problems.add(self._line, texts)
            size = sum(len(text.encode("utf-8")) for text in texts)
        except UnicodeDecodeError:
            self._problems.add(self._line, "is not valid UTF-8")
        except UnicodeEncodeError:
            self._problems.add(self._line, "has half of a surrogate pair in a text")
        except RecursionError:
            self._problems.add(self._line, "is nested too deeply")
        except ValueError as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "bad number"
            self._problems.add(self._line, f"is not valid JSON: {reason}")
        else:
            self._kind = kind
            self._documents += size > 0  # one without text is left out of the tokens as well
            self._text_bytes += size
            self._longest_bytes = max(self._longest_bytes, size)


def _kind_of(value: dict[str, Any]) -> DatasetKind:
    """What a line is meant to be: an object that is nothing is held to be a text."""
    if "messages" in value:
        return "messages"
    return "prompt_completion" if {"prompt", "completion"} & value.keys() and "text" not in value else "text"


def _text(value: dict[str, Any]) -> list[str] | str:
    """The texts of a line, or what is wrong with it."""
    if {"prompt", "completion"} <= value.keys():
        return 'has both "text" and "prompt" with "completion"'
    text = value.get("text")
    return [text] if isinstance(text, str) else 'has no "text", or one that is not a string'


def _prompt_completion(value: dict[str, Any]) -> list[str] | str:
    texts = []
    for name in ("prompt", "completion"):
        if not isinstance(text := value.get(name), str):
            return f'has no "{name}", or one that is not a string'
        texts.append(text)
    return texts if texts[1] else 'has an empty "completion"'


def _messages(value: dict[str, Any]) -> list[str] | str:
    if "text" in value or {"prompt", "completion"} <= value.keys():
        return 'has "messages" and another kind of document'
    messages = value.get("messages")
    if not isinstance(messages, list) or not messages:
        return 'has no "messages", or not a list with at least one'
    texts = []
    for number, message in enumerate(messages, 1):
        for name in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(text := message.get(name), str):
                return f'has no "{name}" in message {number}, or one that is not a string'
            texts.append(text)
    return texts


_TEXTS = {"text": _text, "prompt_completion": _prompt_completion, "messages": _messages}


def _empty() -> DatasetInvalidError:
    return DatasetInvalidError("The file holds no text.", [{"line": 1, "reason": "the file holds no text"}], 1)
