"""Token files: a plain array of 16-bit little-endian tokens beside the text that it was made from.

    python -m slim_core.data.tokens --memory BYTES FILE ...        make those that are missing, in a process of its own

Free of torch and numpy: the process that makes them is small, and what it needs is what the documents need.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from slim_core.data.tokenizer import DOCUMENT_BORDER

TOKEN_BYTES = 2
BROKEN_DATASET = 2
"""Exit status of this module as a program for an input that cannot be trained on; the reason is its last line."""
NO_MEMORY = 3
"""... for a document that cannot be parsed in the memory that it was given."""
NO_SPACE = 4
"""... and for a full disk."""
NO_SPACE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Of a disk, a quota and a limit on the size of files."""
_BLOCK_BYTES = 1 << 20


class DatasetError(ValueError):
    """A dataset that cannot be trained on; the message says why."""


def token_path(source: Path) -> Path:
    """Where the token file of a `.txt` or `.jsonl` file is, or will be."""
    return source.with_name("tokens-bytes.bin")


def token_file(source: Path) -> Path:
    """The token file of a `.txt` or `.jsonl` file, made beside it on first use.

    A `.txt` is read in blocks; a line of a `.jsonl` is parsed whole, which takes about four times its size. Complete
    or absent, also when the machine stops meanwhile. Raises DatasetError, naming the line, for broken input.
    """
    target = token_path(source)
    if target.exists():
        return target
    temporary = target.with_name(f"{target.name}.tmp")
    with source.open("rb") as lock:
        # One process at a time; what one that was killed has left is overwritten by the next.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        try:
            with temporary.open("wb") as file:
                for document in _documents(source):
                    for block in document:
                        file.write(_tokens(block))
                    file.write(DOCUMENT_BORDER.to_bytes(TOKEN_BYTES, "little"))
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(target)
        finally:
            temporary.unlink(missing_ok=True)
    return target


def main() -> int:
    """Make the token files of the arguments with at most `--memory` bytes of private memory; the exit status is
    BROKEN_DATASET or NO_MEMORY where that is not possible."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=int, required=True, metavar="BYTES")
    parser.add_argument("sources", type=Path, nargs="+", metavar="FILE")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_DATA, (arguments.memory, arguments.memory))
    try:
        for source in arguments.sources:
            token_file(source)
    except DatasetError as error:
        sys.stderr.write(f"{error}\n")
        return BROKEN_DATASET
    except MemoryError:
        return NO_MEMORY
    except OSError as error:
        if error.errno not in NO_SPACE_ERRORS:
            raise
        return NO_SPACE
    return 0


def _tokens(text: bytes | memoryview) -> bytearray:
    """A token a byte."""
    tokens = bytearray(TOKEN_BYTES * len(text))
    tokens[::TOKEN_BYTES] = text
    return tokens


def _documents(source: Path) -> Iterator[Iterator[bytes | memoryview]]:
    """Each document as blocks of UTF-8."""
    with source.open("rb") as file:
        if source.suffix == ".txt":
            yield _file_blocks(file)
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _blocks(_text_of(line, number))


def _file_blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(_BLOCK_BYTES):
        yield block


def _blocks(text: bytes) -> Iterator[memoryview]:
    for start in range(0, len(text), _BLOCK_BYTES):
        yield memoryview(text)[start : start + _BLOCK_BYTES]


def _text_of(line: bytes, number: int) -> bytes:
    try:
        text: Any = json.loads(line)["text"]
        return text.encode()  # type: ignore[no-any-return]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DatasetError(f'line {number}: expected {{"text": "..."}}') from error


if __name__ == "__main__":
    sys.exit(main())
