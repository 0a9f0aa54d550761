"""Token folders: what is in them, when they appear, and what making one takes."""

from __future__ import annotations

import errno
import fcntl
import gzip
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from slim_core.data import encoding, prepare
from slim_core.data.prepare import make_tokens
from slim_core.data.tokenizer import DOCUMENT_BORDER, load_tokenizer, tokenizer_key
from slim_core.data.tokens import (
    BROKEN_DATASET,
    NO_MEMORY_STATUSES,
    NO_SPACE,
    DatasetError,
    read_meta,
    token_bytes,
    token_folder,
)
from slim_core.data.train_tokenizer import train_tokenizer
from tests.unit.core_support import names

ROOT = Path(__file__).resolve().parents[2]
BORDER = DOCUMENT_BORDER
MEMORY = 250 << 20


def written(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(content)
    return path


def lines(*records: dict[str, Any]) -> bytes:
    return "\n".join(json.dumps(record) for record in records).encode()


def array(folder: Path, name: str, kind: str = "<u2") -> list[int]:
    return [int(value) for value in np.fromfile(folder / name, kind)]


def test_a_folder_holds_tokens_borders_and_counts(tmp_path: Path) -> None:
    content = lines({"text": "a\nb"}, {"text": ""}, {"text": "☃"}, {"text": "x" * 64})
    folder = make_tokens(written(tmp_path, "data.jsonl", content))
    assert folder == tmp_path / "tokens-bytes"
    assert names(folder) == ["documents.bin", "meta.json", "tokens.bin"]
    assert array(folder, "tokens.bin") == [*b"a\nb", BORDER, *"☃".encode(), BORDER, *b"x" * 64, BORDER]
    assert array(folder, "documents.bin", "<i8") == [0, 4, 8, 73]
    meta = read_meta(folder)
    assert json.loads((folder / "meta.json").read_text()) == meta.to_json() == {
        "version": 1,
        "tokenizer": "bytes",
        "vocab_size": 257,
        "token_bytes": 2,
        "end_of_document": 256,
        "kind": "text",
        "documents": 3,
        "tokens": 73,
        "targets": 73,
        "longest": 65,
        "histogram": {"4": 2, "128": 1},
        "empty_documents": 1,
        "untrained_documents": 0,
        "inexact_cuts": 0,
        "text_bytes": 70,
        "source_bytes": len(content),
    }  # fmt: skip


def test_a_completion_has_a_loss_to_its_end_and_its_prompt_none(tmp_path: Path) -> None:
    records = [
        {"prompt": "2+2=", "completion": "4"},
        {"prompt": "", "completion": ""},
        {"prompt": "?", "completion": ""},
    ]
    folder = make_tokens(written(tmp_path, "data.jsonl", lines(*records)))
    assert array(folder, "tokens.bin") == [*b"2+2=4", BORDER, *b"?", BORDER]
    assert array(folder, "mask.bin", "u1") == [0, 0, 0, 0, 1, 1, 0, 1]
    assert (read_meta(folder).targets, read_meta(folder).empty_documents) == (3, 1)


def test_only_what_the_assistant_wrote_has_a_loss(tmp_path: Path) -> None:
    user, assistant = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
    records = [{"messages": [user, assistant]}, {"messages": [user, assistant, user]}, {"messages": [user]}]
    folder = make_tokens(written(tmp_path, "data.jsonl", lines(*records)))
    asked = "<|im_start|>user\nhi<|im_end|>\n"
    first = f"{asked}<|im_start|>assistant\nyo<|im_end|>\n"
    tokens, mask = array(folder, "tokens.bin"), array(folder, "mask.bin", "u1")
    assert tokens == [*first.encode(), BORDER, *first.encode(), *asked.encode(), BORDER]
    border = len(first) + 1
    trained = bytes(token for token, loss in zip(tokens[: border - 1], mask, strict=False) if loss)
    assert trained == b"yo<|im_end|>\n"
    assert mask[border - 1] == 1
    assert mask[-1] == 0
    assert sum(mask) == 2 * len(trained) + 1 == read_meta(folder).targets
    assert (read_meta(folder).documents, read_meta(folder).untrained_documents) == (2, 1)


def test_a_document_ends_once(tmp_path: Path) -> None:
    """A template that writes the last token itself is not given another."""
    source = written(tmp_path, "text.txt", "\n\n".join(topics.values()).encode()[:60_000])
    folder = train_tokenizer(source, 400, tmp_path / "bpe")
    config = {
        "eos_token": "<|endoftext|>",
        "chat_template": "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder)
    messages = [{"role": "assistant", "content": "def"}, {"role": "assistant", "content": "class"}]
    made = make_tokens(written(tmp_path, "data.jsonl", lines({"messages": messages})), tokenizer)
    assert made.name == f"tokens-{tokenizer_key(folder)}"
    end = tokenizer.end_of_document
    assert array(made, "tokens.bin") == [*tokenizer.encode("def"), end, *tokenizer.encode("class"), end]


def test_large_vocabularies_have_wide_tokens() -> None:
    assert [token_bytes(size) for size in (257, 65_536, 65_537, 1 << 31)] == [2, 2, 4, 4]


@pytest.mark.parametrize("name", ["data.txt", "data.jsonl"])
def test_batches_and_pieces_change_no_token(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = list(topics.values())[:20]
    content = "\n".join(texts).encode() if name == "data.txt" else lines(*({"text": text} for text in texts))
    source = written(tmp_path, name, content)
    folder = train_tokenizer(source, 500, tmp_path / "bpe")
    tokenizer = load_tokenizer(folder)
    whole = make_tokens(source, tokenizer, tmp_path / "whole")
    for module_name, value in (("PIECE_CHARACTERS", 700), ("BATCH_CHARACTERS", 2500), ("_BATCH_PIECES", 7)):
        monkeypatch.setattr(encoding, module_name, value)
    monkeypatch.setattr(encoding, "_SEARCHED_CHARACTERS", 200)
    pieces = make_tokens(source, tokenizer, tmp_path / "pieces")
    for file in names(whole):
        assert (pieces / file).read_bytes() == (whole / file).read_bytes(), file


def conversation(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": content}]


def test_every_line_that_is_wrong_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    refused = (
        "{{ raise_exception('no') if messages[0].content == 'no' }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    source = written(tmp_path, "text.txt", b"some words for a tokenizer")
    folder = train_tokenizer(source, 300, tmp_path / "bpe")
    (folder / "chat_template.jinja").write_text(refused)
    messages = [conversation("yes"), conversation("no"), conversation("yes")[1:]]
    content = lines(*({"messages": m} for m in messages), {"text": "t"}) + b"\n?"
    with pytest.raises(DatasetError) as caught:
        make_tokens(written(tmp_path / "it", "data.jsonl", content), load_tokenizer(folder))
    assert [(problem.line, problem.reason) for problem in caught.value.problems] == [
        (2, "the chat template does not take it: no"),
        (3, "the chat template takes no conversation that the assistant begins"),
        (4, 'is {"text"}, but line 1 is {"messages"}: one kind a file'),
        (5, "is not valid JSON: Expecting value at column 1"),
    ]
    assert names(tmp_path / "it") == ["data.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("data.txt", b"", "holds no text"),
        ("data.jsonl", b'\n{"text": ""}\n', "holds no text"),
        ("data.jsonl", lines({"messages": [{"role": "user", "content": "hi"}]}), "none of its 1 documents has a part"),
        ("data.csv", b"text", "must end in"),
    ],
)
def test_a_file_without_anything_to_train_on(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=reason):
        make_tokens(written(tmp_path, name, content))


def test_a_folder_appears_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(tmp_path, "source.txt", b"text")
    synced: list[tuple[str, bool]] = []

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append((path.name, token_folder(source, "bytes").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    make_tokens(source)
    before = {name for name, exists in synced if not exists}
    assert before == {"tokens.bin", "documents.bin", "meta.json", "tokens-bytes.tmp"}
    assert synced[-1] == (tmp_path.name, True)
    assert names(tmp_path) == ["source.txt", "tokens-bytes"]


def test_a_folder_is_made_once(tmp_path: Path) -> None:
    source = written(tmp_path, "source.txt", b"text")
    first = make_tokens(source)
    source.unlink()
    assert make_tokens(source) == first


def test_one_process_makes_it_and_what_a_killed_one_left_is_gone(tmp_path: Path) -> None:
    source = written(tmp_path, "source.txt", b"text")
    written(tmp_path / "tokens-bytes.tmp", "tokens.bin", b"half")
    with source.open("rb") as held, ThreadPoolExecutor() as pool:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = pool.submit(make_tokens, source)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.3)
        fcntl.flock(held, fcntl.LOCK_UN)
        assert array(waiting.result(timeout=10), "tokens.bin") == [*b"text", BORDER]
    assert names(tmp_path) == ["source.txt", "tokens-bytes"]


def test_a_folder_of_another_version_says_so(tmp_path: Path) -> None:
    folder = make_tokens(written(tmp_path, "source.txt", b"text"))
    (folder / "meta.json").write_text('{"version": 0}')
    with pytest.raises(DatasetError, match="made by another version"):
        read_meta(folder)


def program(module: str, source: Path, out: Path, *options: str, memory: int = MEMORY) -> tuple[int, str, int]:
    """Exit status, stderr, and peak of private and shared memory in bytes."""
    measured = (
        "import resource, runpy, sys\n"
        "module = sys.argv.pop(1)\n"
        "try:\n    runpy.run_module(module, run_name='__main__', alter_sys=True)\n"
        "finally:\n    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    command = [sys.executable, "-c", measured, module]
    arguments = ["--memory", str(memory), "--source", str(source), "--out", str(out), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr, int(done.stdout or 0)


PREPARE, TRAIN = "slim_core.data.prepare", "slim_core.data.train_tokenizer"


def test_the_programs_make_what_the_functions_make(tmp_path: Path) -> None:
    source = written(tmp_path, "data.txt", "\n".join(topics.values()).encode()[:50_000])
    bpe = tmp_path / "bpe"
    assert program(TRAIN, source, bpe, "--vocab-size", "400")[:2] == (0, "")
    assert program(PREPARE, source, tmp_path / "out", "--tokenizer", str(bpe))[:2] == (0, "")
    wanted = make_tokens(source, load_tokenizer(bpe))
    for name in names(wanted):
        assert (tmp_path / "out" / name).read_bytes() == (wanted / name).read_bytes()


def test_the_programs_say_what_is_wrong(tmp_path: Path) -> None:
    source = written(tmp_path, "data.jsonl", b'{"text": "good"}\n?\n{"no": 1}')
    reason = "line 2: is not valid JSON: Expecting value at column 1 (and 1 more)"
    for module, options in ((PREPARE, []), (TRAIN, ["--vocab-size", "300"])):
        status, stderr, _ = program(module, source, tmp_path / "out", *options)
        *_, facts, last = stderr.splitlines()
        assert (status, last) == (BROKEN_DATASET, reason)
        assert json.loads(facts)["total_problems"] == 2
        assert [problem["line"] for problem in json.loads(facts)["problems"]] == [2, 3]
    status, stderr, _ = program(PREPARE, source, tmp_path / "out", "--tokenizer", str(tmp_path))
    assert (status, stderr.splitlines()[-1]) == (BROKEN_DATASET, "tokenizer: there is no tokenizer.json")
    status, stderr, _ = program(PREPARE, source, tmp_path / "out", "--most-text", "5")
    assert (status, stderr.splitlines()[-1]) == (BROKEN_DATASET, "holds more than 5 bytes when it is decompressed")
    assert names(tmp_path) == ["data.jsonl"]


@pytest.mark.parametrize("module", [PREPARE, TRAIN])
def test_a_program_that_has_too_little_memory_says_so(module: str, tmp_path: Path) -> None:
    source = written(tmp_path, "data.jsonl", lines({"text": "word " * 6_000_000}))
    options = ["--vocab-size", "300"] if module == TRAIN else []
    status, _, _ = program(module, source, tmp_path / "out", *options, memory=80 << 20)
    assert status in NO_MEMORY_STATUSES
    assert names(tmp_path) == ["data.jsonl"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_has_its_own_status(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(code, "full")

    monkeypatch.setattr(prepare, "write_documents", full)
    monkeypatch.setattr("resource.setrlimit", lambda *_: None)
    source = written(tmp_path, "data.txt", b"text")
    assert prepare.run_limited(MEMORY, lambda: make_tokens(source)) == NO_SPACE
    assert names(tmp_path) == ["data.txt"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tokenizer", "size"),
    [
        ("data.txt", "bytes", 2 << 20),
        ("data.jsonl.gz", "bytes", 2 << 20),
        ("data.jsonl.zst", "bytes", 2 << 20),
        ("data.parquet", "bytes", 2 << 20),
        ("data.txt", "bpe", 1 << 19),
        ("data.jsonl", "bpe", 1 << 19),
    ],
)
def test_memory_does_not_grow_with_the_file(name: str, tokenizer: str, size: int, tmp_path: Path) -> None:
    """Twenty times the text takes ten MiB more at most."""
    small, large = (big_file(tmp_path / str(factor), name, factor * size) for factor in (1, 20))
    if tokenizer == "bpe":
        sample = written(tmp_path, "sample.txt", "\n".join(topics.values()).encode()[:100_000])
        tokenizer = str(train_tokenizer(sample, 1000, tmp_path / "bpe"))
    peaks = []
    for source in (small, large):
        status, stderr, peak = program(PREPARE, source, source.parent / "out", "--tokenizer", tokenizer)
        assert status == 0, stderr
        peaks.append(peak)
    assert read_meta(large.parent / "out").text_bytes > 19 * read_meta(small.parent / "out").text_bytes
    assert peaks[1] - peaks[0] < 10 << 20, peaks


def big_file(folder: Path, name: str, size: int) -> Path:
    """About `size` bytes of text, in documents of some kilobytes."""
    texts = list(topics.values())
    repeated = [f"{n}\n{texts[n % len(texts)]}" for n in range(size * len(texts) // sum(map(len, texts)))]
    folder.mkdir()
    path = folder / name
    if name.endswith(".parquet"):
        table = pa.table({"text": repeated})
        parquet.write_table(table, path, row_group_size=1000)
        return path
    content = "\n".join(repeated).encode() if ".txt" in name else lines(*({"text": text} for text in repeated))
    wrap = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}.get(name.rsplit(".", 1)[-1], bytes)
    path.write_bytes(wrap(content))
    return path
