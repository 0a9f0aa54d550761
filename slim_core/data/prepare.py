"""From a dataset's file to its token folder.

    python -m slim_core.data.prepare --memory BYTES --source FILE --tokenizer bytes|FOLDER --out FOLDER

As a program: with at most so much private memory, and with the exit statuses of slim_core/data/tokens.py.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from slim_core.data.encoding import write_documents
from slim_core.data.readers import Document, read_documents
from slim_core.data.tokenizer import BYTES_KEY, ByteTokenizer, Tokenizer, TokenizerError, load_tokenizer
from slim_core.data.tokens import (
    BROKEN_DATASET,
    NO_MEMORY,
    NO_SPACE,
    NO_SPACE_ERRORS,
    DatasetError,
    Meta,
    Problems,
    TokenWriter,
    token_bytes,
    token_folder,
    write_meta,
)


def make_tokens(
    source: Path, tokenizer: Tokenizer | None = None, out: Path | None = None, limit_bytes: int | None = None
) -> Path:
    """The token folder of a file, made on first use: `out`, or beside the file. Bytes unless a tokenizer is given.

    Complete or absent, also when the machine stops meanwhile. Memory does not depend on the file's size, but a line is
    parsed whole, which takes about four times its size. Raises DatasetError, with every line that is not a document.
    """
    tokenizer = tokenizer or ByteTokenizer()
    out = out or token_folder(source, tokenizer.id)
    if out.exists():
        return out
    temporary = out.with_name(f"{out.name}.tmp")
    with source.open("rb") as lock:
        # One process at a time; what one that was killed has left is removed by the next.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if out.exists():
            return out
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            write_meta(temporary, _write(source, tokenizer, temporary, limit_bytes))
            _sync(temporary)
            temporary.rename(out)
            _sync(out.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return out


def _write(source: Path, tokenizer: Tokenizer, folder: Path, limit_bytes: int | None) -> Meta:
    problems = Problems()
    documents = read_documents(source, problems, limit_bytes)
    first = next(documents, None)
    kind = "text" if first is None else first.kind
    remaining: Iterator[Document] = documents if first is None else chain([first], documents)
    with TokenWriter(folder, tokenizer.vocab_size, masked=kind != "text") as writer:
        counts = write_documents(remaining, tokenizer, writer, problems)
        problems.raise_if_any()
        if writer.tokens == 0:
            left_out = counts.untrained_documents
            reason = f"none of its {left_out} documents has a part with a loss" if left_out else "holds no text"
            raise DatasetError(reason)
        return Meta(
            tokenizer=tokenizer.id,
            vocab_size=tokenizer.vocab_size,
            token_bytes=token_bytes(tokenizer.vocab_size),
            end_of_document=tokenizer.end_of_document,
            kind=kind,
            empty_documents=counts.empty_documents,
            untrained_documents=counts.untrained_documents,
            inexact_cuts=counts.inexact_cuts,
            text_bytes=counts.text_bytes,
            source_bytes=source.stat().st_size,
            **writer.finish(),
        )


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def run_limited(memory_bytes: int, action: Callable[[], object]) -> int:
    """Do it with at most so much private memory; the exit status of a program, and what there is to say on stderr.

    The tokenizers library takes the threads that OMP_NUM_THREADS allows, where it is set: its own default is all cores.
    """
    if threads := os.environ.get("OMP_NUM_THREADS"):
        os.environ.setdefault("RAYON_NUM_THREADS", threads)
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a library that is refused memory aborts
    try:
        action()
    except DatasetError as error:
        sys.stderr.write(f"{json.dumps(error.to_json())}\n{_one_line(error)}\n")
        return BROKEN_DATASET
    except TokenizerError as error:
        sys.stderr.write(f"{json.dumps(DatasetError('').to_json())}\ntokenizer: {_one_line(error)}\n")
        return BROKEN_DATASET
    except MemoryError:
        return NO_MEMORY
    except OSError as error:
        if error.errno not in NO_SPACE_ERRORS:
            raise
        return NO_SPACE
    return 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def main() -> int:
    """Make one token folder; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=int, required=True, metavar="BYTES")
    parser.add_argument("--source", type=Path, required=True, metavar="FILE")
    parser.add_argument("--tokenizer", default=BYTES_KEY, metavar="bytes|FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--most-text", type=int, metavar="BYTES", help="of the file when it is decompressed")
    options = parser.parse_args()

    def action() -> None:
        tokenizer = load_tokenizer(None if options.tokenizer == BYTES_KEY else Path(options.tokenizer))
        make_tokens(options.source, tokenizer, options.out, options.most_text)

    return run_limited(options.memory, action)


if __name__ == "__main__":
    sys.exit(main())
