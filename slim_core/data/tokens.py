"""Token folders: what a dataset becomes under a tokenizer, and what can go wrong on the way.

    tokens-<tokenizer key>/
        tokens.bin       every document's tokens in a row, 16 or 32 bits each by the size of the vocabulary
        documents.bin    64 bits: where each document begins in it, and the end of the last
        mask.bin         a byte a token, 1 where it has a loss as a target; absent where all have
        meta.json        `Meta`

All numbers are little-endian. A folder is complete or absent. Free of torch and numpy: the process that makes one is
small, and what it needs is what the documents need. What reads one maps it (slim_core/data/dataset.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import signal
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

FORMAT_VERSION = 1
MAX_PROBLEMS = 20
"""Listed of those that a file has; all are counted."""

BROKEN_DATASET = 2
"""Exit status of the programs of this package for an input that cannot be used; the reason is the last line of stderr,
and the line before it holds `DatasetError.to_json`."""
NO_MEMORY = 3
"""... for a document that cannot be parsed in the memory that it was given."""
NO_MEMORY_STATUSES = frozenset({NO_MEMORY, -signal.SIGABRT})
"""How such a program ends then: some libraries abort where they are refused memory."""
NO_SPACE = 4
"""... and for a full disk."""
NO_SPACE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Of a disk, a quota and a limit on the size of files."""


class DatasetError(ValueError):
    """A dataset that cannot be trained on; the message says why."""

    def __init__(self, message: str, problems: Sequence[Problem] = (), total_problems: int | None = None) -> None:
        super().__init__(message)
        self.problems = list(problems)
        """By line, at most MAX_PROBLEMS; none where the reason is not one of lines."""
        self.total_problems = len(self.problems) if total_problems is None else total_problems

    def to_json(self) -> dict[str, Any]:
        """{"problems": [{"line", "reason"}, ...], "total_problems"}."""
        problems = [dataclasses.asdict(problem) for problem in self.problems]
        return {"problems": problems, "total_problems": self.total_problems}


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong with a dataset."""

    line: int
    """Of the decompressed file, from 1; of a `.parquet`, the row."""
    reason: str


@dataclass(slots=True)
class Problems:
    """All that is wrong with a dataset: the first few, and how many."""

    first: list[Problem] = field(default_factory=list)
    total: int = 0

    def add(self, line: int, reason: str) -> None:
        self.total += 1
        if len(self.first) < MAX_PROBLEMS:
            self.first.append(Problem(line, reason))

    def raise_if_any(self) -> None:
        """Raises DatasetError with the first problem as its message."""
        if self.total:
            more = f" (and {self.total - 1} more)" if self.total > 1 else ""
            message = f"line {self.first[0].line}: {self.first[0].reason}{more}"
            raise DatasetError(message, self.first, self.total)


@dataclass(frozen=True, slots=True)
class Meta:
    """What a token folder holds. Lengths are tokens, the one that ends the document included."""

    tokenizer: str
    """Its key (`slim_core.data.tokenizer.tokenizer_key`)."""
    vocab_size: int
    token_bytes: int
    end_of_document: int
    """Token that every document ends with."""
    kind: str
    """text, completion or messages (`slim_core.data.readers`)."""
    documents: int
    tokens: int
    targets: int
    """Tokens that have a loss as a target."""
    longest: int
    """Tokens of the longest document."""
    histogram: dict[str, int]
    """Documents by length: "64" counts those of 33 to 64 tokens. Powers of two, ascending, none that is empty."""
    empty_documents: int
    """Left out because they hold no text."""
    untrained_documents: int
    """Left out because no part has a loss: conversations without an assistant's message."""
    inexact_cuts: int
    """Places where a long text was cut for the tokenizer and may have another token than uncut."""
    text_bytes: int
    """UTF-8, of the documents that are in."""
    source_bytes: int
    """Size of the file."""
    version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def token_folder(source: Path, tokenizer_key: str) -> Path:
    """Where the token folder of a dataset's file is, or will be, unless it is told otherwise."""
    return source.with_name(f"tokens-{tokenizer_key}")


def read_meta(folder: Path) -> Meta:
    """Of a token folder. Raises FileNotFoundError where there is none, DatasetError for one of another version."""
    values: dict[str, Any] = json.loads((folder / "meta.json").read_text())
    if values.get("version") != FORMAT_VERSION:
        raise DatasetError(f"{folder.name}: made by another version; delete it, and it is made again")
    return Meta(**values)


def token_bytes(vocab_size: int) -> int:
    """Bytes of a token on disk."""
    return 2 if vocab_size <= 1 << 16 else 4


class TokenWriter:
    """The arrays of a token folder, written as documents come. A context manager that closes its files."""

    def __init__(self, folder: Path, vocab_size: int, *, masked: bool) -> None:
        self._code = "H" if token_bytes(vocab_size) == 2 else "I"
        self._files = contextlib.ExitStack()
        self._tokens = self._files.enter_context((folder / "tokens.bin").open("wb"))
        self._documents = self._files.enter_context((folder / "documents.bin").open("wb"))
        self._mask = self._files.enter_context((folder / "mask.bin").open("wb")) if masked else None
        self._start = 0
        self._last = -1
        self._lengths: Counter[int] = Counter()
        self.tokens = 0
        self.targets = 0
        self.longest = 0

    def add(self, tokens: Sequence[int], loss: bool) -> None:
        """Append to the document; `loss` says whether these tokens have one as targets."""
        if not tokens:
            return
        self._tokens.write(_packed(tokens, self._code))
        if self._mask is not None:
            self._mask.write((b"\1" if loss else b"\0") * len(tokens))
        self.tokens += len(tokens)
        self.targets += len(tokens) if loss else 0
        self._last = tokens[-1]

    def end_document(self, end_token: int, loss: bool) -> None:
        """The document is over; it gets its last token unless it has it already."""
        if self._last != end_token:
            self.add([end_token], loss)
        self._documents.write(self._start.to_bytes(8, "little"))
        length = self.tokens - self._start
        self._lengths[(length - 1).bit_length()] += 1
        self.longest = max(self.longest, length)
        self._start, self._last = self.tokens, -1

    def finish(self) -> dict[str, Any]:
        """Write the end, make all files durable, and say what they hold (fields of `Meta`)."""
        self._documents.write(self.tokens.to_bytes(8, "little"))
        for file in (self._tokens, self._documents, self._mask):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
        return {
            "documents": sum(self._lengths.values()),
            "tokens": self.tokens,
            "targets": self.targets,
            "longest": self.longest,
            "histogram": {str(1 << power): count for power, count in sorted(self._lengths.items())},
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()


def write_meta(folder: Path, meta: Meta) -> None:
    """Durably."""
    with (folder / "meta.json").open("w") as file:
        json.dump(meta.to_json(), file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _packed(tokens: Iterable[int], code: str) -> bytes | bytearray | array[int]:
    if code == "H" and isinstance(tokens, bytes):  # the byte tokenizer's
        packed = bytearray(2 * len(tokens))
        packed[::2] = tokens
        return packed
    return array(code, tokens)
