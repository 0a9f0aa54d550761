"""Reading a dataset's file as it arrives: validation and counts in flat memory.

`.txt` is one document. `.jsonl` has one document a line, {"text": str}; other keys are ignored, blank lines skipped.
Tokens are counted under the byte tokenizer: UTF-8 bytes plus one border for each document.
"""

from __future__ import annotations

import codecs
import json
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from service.errors import DatasetInvalidError

DatasetFormat = Literal["txt", "jsonl"]

MAX_LINE_BYTES = 64 * 1024**2
MAX_PROBLEMS = 20


@dataclass(slots=True)
class DatasetCounts:
    """What a file holds."""

    documents: int = 0
    tokens: int = 0
    longest_document_tokens: int = 0

    def add_document(self, text_bytes: int) -> None:
        self.documents += 1
        self.tokens += text_bytes + 1
        self.longest_document_tokens = max(self.longest_document_tokens, text_bytes + 1)


class DatasetReader(Protocol):
    """Takes the bytes of a file in any portions, then says what they held."""

    def feed(self, data: bytes) -> None: ...

    def finish(self) -> DatasetCounts:
        """Raises DatasetInvalidError."""
        ...


def reader(file_format: DatasetFormat) -> DatasetReader:
    return TextReader() if file_format == "txt" else JsonLinesReader()


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
        counts = DatasetCounts()
        counts.add_document(self._bytes)
        return counts

    def _decode(self, data: bytes, final: bool = False) -> None:
        if self._problems.total:
            return
        try:
            self._newlines += self._decoder.decode(data, final).count("\n")
        except UnicodeDecodeError as error:
            line = self._newlines + error.object[: error.start].count(b"\n") + 1
            self._problems.add(line, "is not valid UTF-8")


class JsonLinesReader:
    """One JSON object a line. Holds one line at a time, of at most 64 MiB."""

    def __init__(self) -> None:
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._line = 1
        self._counts = DatasetCounts()
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
        if self._counts.documents == self._counts.tokens:  # no document, or borders only
            raise _empty()
        return self._counts

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
            if not isinstance(text := value.get("text"), str):
                return self._problems.add(self._line, 'has no "text", or one that is not a string')
            self._counts.add_document(len(text.encode("utf-8")))
        except UnicodeDecodeError:
            self._problems.add(self._line, "is not valid UTF-8")
        except UnicodeEncodeError:
            self._problems.add(self._line, '"text" has half of a surrogate pair')
        except RecursionError:
            self._problems.add(self._line, "is nested too deeply")
        except ValueError as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "bad number"
            self._problems.add(self._line, f"is not valid JSON: {reason}")


def _empty() -> DatasetInvalidError:
    return DatasetInvalidError("The file holds no text.", [{"line": 1, "reason": "the file holds no text"}], 1)
