"""A byte-level BPE of a dataset's own text.

    python -m slim_core.data.train_tokenizer --memory BYTES --source FILE --vocab-size N --out FOLDER

Writes tokenizer.json and tokenizer_config.json, which transformers loads as well, and training.json: what it was made
from. The same file gives the same tokenizer. Documents are read one by one; the library keeps each distinct word with
its count, so that memory grows with the number of words and not with that of documents. Exit statuses as in
slim_core/data/tokens.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from slim_core.data.encoding import EncodingCounts, cut
from slim_core.data.prepare import run_limited
from slim_core.data.readers import CompletionDocument, Document, TextDocument, read_documents
from slim_core.data.tokenizer import ByteTokenizer
from slim_core.data.tokens import DatasetError, Problems

END_OF_DOCUMENT = "<|endoftext|>"
MIN_VOCABULARY = 257
"""Every byte, and the end of a document."""


def train_tokenizer(source: Path, vocab_size: int, out: Path, limit_bytes: int | None = None) -> Path:
    """Make `out`, a folder of at most `vocab_size` tokens: fewer where the text has no more pairs to merge.

    Complete or absent. Raises DatasetError, ValueError.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415  # as in tokenizer.py

    if vocab_size < MIN_VOCABULARY:
        raise ValueError(f"vocab_size: must be at least {MIN_VOCABULARY}: every byte, and the end of a document")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    problems = Problems()
    used = EncodingCounts()
    texts = _counted(_texts(read_documents(source, problems, limit_bytes), used), used, problems)
    tokenizer.train_from_iterator(texts, trainer)
    problems.raise_if_any()
    if not used.text_bytes:
        raise DatasetError("holds no text")
    temporary = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        facts = {"source": source.name, "text_bytes": used.text_bytes, "vocab_size": tokenizer.get_vocab_size()}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_DOCUMENT}
        _write(temporary / "tokenizer.json", tokenizer.to_str())
        _write(temporary / "tokenizer_config.json", json.dumps(config, indent=1))
        _write(temporary / "training.json", json.dumps(facts, indent=1))
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _counted(texts: Iterator[str], used: EncodingCounts, problems: Problems) -> Iterator[str]:
    """Once there are problems the rest is only looked at."""
    for text in texts:
        used.text_bytes += len(text.encode())
        if not problems.total:
            yield text


def _texts(documents: Iterator[Document], used: EncodingCounts) -> Iterator[str]:
    """All that a document says, without the words of a chat template; long texts in pieces."""
    whole = ByteTokenizer()
    for document in documents:
        if isinstance(document, TextDocument):
            parts: Iterator[str] = document.text
        elif isinstance(document, CompletionDocument):
            parts = iter([document.prompt, document.completion])
        else:
            parts = iter([message["content"] for message in document.messages])
        yield from itertools.chain.from_iterable(cut([part], whole, used) for part in parts)


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def main() -> int:
    """Make one tokenizer; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=int, required=True, metavar="BYTES")
    parser.add_argument("--source", type=Path, required=True, metavar="FILE")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--most-text", type=int, metavar="BYTES", help="of the file when it is decompressed")
    options = parser.parse_args()
    return run_limited(
        options.memory,
        lambda: train_tokenizer(options.source, options.vocab_size, options.out, options.most_text),
    )


if __name__ == "__main__":
    sys.exit(main())
