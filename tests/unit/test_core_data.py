"""Token files and the order of batches."""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slim_core.data import tokenizer
from slim_core.data.dataset import Windows, permute
from slim_core.data.tokens import DatasetError, token_file
from tests.unit.core_support import names

BORDER = tokenizer.DOCUMENT_BORDER


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def tokens_of(source: Path) -> list[int]:
    return [int(token) for token in np.fromfile(token_file(source), "<u2")]


def numbered(folder: Path, count: int) -> Path:
    """A token file whose token i is i."""
    path = folder / "tokens.bin"
    np.arange(count, dtype="<u2").tofile(path)
    return path


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    text = "first line\n\nnaïve ☃\n"
    assert tokens_of(written(tmp_path, "source.txt", text.encode())) == [*text.encode(), BORDER]


def test_a_long_text_file_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slim_core.data.tokens._BLOCK_BYTES", 7)
    content = os.urandom(50)
    assert tokens_of(written(tmp_path, "source.txt", content)) == [*content, BORDER]


def test_each_json_line_is_a_document_and_blank_lines_are_none(tmp_path: Path) -> None:
    lines = ['{"text": "a\\nb", "other": 1}', "", "  ", '{"text": "☃"}', '{"text": ""}']
    source = written(tmp_path, "source.jsonl", "\n".join(lines).encode())
    assert tokens_of(source) == [*b"a\nb", BORDER, *"☃".encode(), BORDER, BORDER]


@pytest.mark.parametrize(
    "line",
    [
        b"not json",
        b'{"txt": "no text"}',
        b'{"text": 3}',
        b'{"text": null}',
        b'["text"]',
        b"3",
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": "cut',
    ],
)
def test_a_broken_line_is_named_and_leaves_nothing_behind(line: bytes, tmp_path: Path) -> None:
    source = written(tmp_path, "source.jsonl", b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(DatasetError, match="line 3:"):
        token_file(source)
    assert names(tmp_path) == ["source.jsonl"]


def test_a_token_file_appears_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(tmp_path, "source.txt", b"text")
    synced: list[list[str]] = []

    def fsync(descriptor: int) -> None:
        assert os.fstat(descriptor).st_size == 2 * 5
        synced.append(names(tmp_path))

    monkeypatch.setattr(os, "fsync", fsync)
    token_file(source)
    assert len(synced) == 1
    assert "tokens-bytes.bin" not in synced[0]
    assert names(tmp_path) == ["source.txt", "tokens-bytes.bin"]


def test_a_token_file_is_made_once(tmp_path: Path) -> None:
    source = written(tmp_path, "source.txt", b"text")
    first = token_file(source)
    source.unlink()
    assert token_file(source) == first


def test_one_process_makes_it_and_what_a_killed_one_left_is_gone(tmp_path: Path) -> None:
    source = written(tmp_path, "source.txt", b"text")
    (tmp_path / "tokens-bytes.bin.tmp").write_bytes(b"half")
    with source.open("rb") as held, ThreadPoolExecutor() as pool:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = pool.submit(token_file, source)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.3)
        fcntl.flock(held, fcntl.LOCK_UN)
        assert tokens_of(waiting.result(timeout=10).parent / "source.txt") == [*b"text", BORDER]
    assert names(tmp_path) == ["source.txt", "tokens-bytes.bin"]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_the_tokenizer_is_reversible(text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_borders_and_broken_text_can_be_read() -> None:
    assert tokenizer.decode([*b"a", BORDER, *b"b", 0xFF]) == "a\n---\nb\ufffd"


def starts_of_epoch(windows: Windows, epoch: int) -> list[int]:
    """Where each window of an epoch starts, in the order of training; the token file is numbered."""
    first = epoch * windows.per_epoch
    return [int(windows.batch(index, 1)[0][0, 0]) for index in range(first, first + windows.per_epoch)]


@pytest.mark.parametrize("count", [11, 101, 107, 110, 1003])
def test_each_epoch_visits_each_window_once(count: int, tmp_path: Path) -> None:
    windows = Windows(numbered(tmp_path, count), 10, seed=1)
    assert windows.per_epoch == (count - 1) // 10
    offsets = set()
    for epoch in range(30):
        starts = sorted(starts_of_epoch(windows, epoch))
        assert [b - a for a, b in pairwise(starts)] == [10] * (windows.per_epoch - 1)
        assert starts[0] >= 0
        assert starts[-1] + 10 < count
        offsets.add(starts[0])
    slack = (count - 1) % 10
    assert offsets <= set(range(slack + 1))
    if slack >= 3:
        assert len(offsets) > 1, "the tail of the text is never trained on"


def test_batches_are_rows_of_the_order_with_targets_shifted_by_one(tmp_path: Path) -> None:
    windows = Windows(numbered(tmp_path, 505), 10, seed=1)
    tokens, targets = windows.batch(first=12, count=4)
    assert tokens.shape == targets.shape == (4, 10)
    assert (targets == tokens + 1).all()
    assert (tokens[:, 1:] == tokens[:, :-1] + 1).all()
    order = starts_of_epoch(windows, 0)
    assert tokens[:, 0].tolist() == order[12:16]


def test_a_batch_may_span_epochs(tmp_path: Path) -> None:
    windows = Windows(numbered(tmp_path, 55), 10, seed=1)
    assert windows.per_epoch == 5
    tokens, _ = windows.batch(first=4, count=4)
    assert tokens[:, 0].tolist() == [*starts_of_epoch(windows, 0)[4:], *starts_of_epoch(windows, 1)[:3]]


def test_the_order_depends_on_the_seed_and_the_epoch_alone(tmp_path: Path) -> None:
    path = numbered(tmp_path, 1001)
    orders = [starts_of_epoch(Windows(path, 10, seed), epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert starts_of_epoch(Windows(path, 10, 2), 1) == orders[3]
    assert sorted(orders[0]) != orders[0]


def test_validation_windows_are_in_the_order_of_the_file(tmp_path: Path) -> None:
    windows = Windows(numbered(tmp_path, 55), 10, seed=1)
    tokens, targets = windows.validation(first=2, count=2)
    assert tokens[:, 0].tolist() == [20, 30]
    assert (targets == tokens + 1).all()


def test_high_tokens_are_not_negative(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    np.full(9, 65_534, dtype="<u2").tofile(path)
    tokens, targets = Windows(path, 8, seed=0).batch(0, 1)
    assert tokens.tolist() == targets.tolist() == [[65_534] * 8]


def test_a_sequence_needs_one_token_more_than_its_length(tmp_path: Path) -> None:
    assert Windows(numbered(tmp_path, 11), 10, seed=0).per_epoch == 1
    with pytest.raises(DatasetError, match="10 tokens; a sequence of 10"):
        Windows(numbered(tmp_path, 10), 10, seed=0)


@settings(deadline=None, derandomize=True)
@given(size=st.integers(1, 1500), key=st.binary(min_size=16, max_size=16))
def test_permute_is_a_bijection(size: int, key: bytes) -> None:
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [*range(1, 20), 255, 256, 257, 1023, 1024, 1025, 4097])
def test_permute_is_a_bijection_around_powers_of_two(size: int) -> None:
    assert sorted(permute(index, size, b"key") for index in range(size)) == list(range(size))


def test_permute_mixes() -> None:
    """Of few elements every order turns up; of many, an element rarely keeps its place or its neighbour."""
    orders = Counter(tuple(permute(index, 3, seed.to_bytes(2, "little")) for index in range(3)) for seed in range(600))
    assert len(orders) == 6
    assert min(orders.values()) > 50
    order = [permute(index, 1000, b"key") for index in range(1000)]
    assert sum(place == index for index, place in enumerate(order)) < 10
    assert sum(b - a == 1 for a, b in pairwise(order)) < 10


def test_a_permutation_of_billions_takes_no_time() -> None:
    values = {permute(index, 3_000_000_000, b"key") for index in range(1000)}
    assert len(values) == 1000
    assert max(values) < 3_000_000_000
    assert max(values) > 2_000_000_000


def test_a_document_line_is_json_whatever_its_encoding_marks(tmp_path: Path) -> None:
    line = json.dumps({"text": "ascii escapes \u2028 are one line"}, ensure_ascii=False)
    assert tokens_of(written(tmp_path, "source.jsonl", line.encode())) == [*json.loads(line)["text"].encode(), BORDER]
